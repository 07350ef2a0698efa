"""Sixty and more kinds of bad or odd pictures, through 01 (photographs), 02 (warp), 04, 05 and 06 (a question about each).

A kind is READ (every viewer shows it: it must come through), BAD (it must be named and skipped) or EITHER (a damaged picture
that some decoders show: only no traceback, and no good neighbour lost). 01 takes JPEG, PNG and WebP of 32 pixels and more only.
"""
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from harness import TINY, Row, before, run
from PIL import Image, PngImagePlugin

READ, BAD, EITHER = "read", "bad", "either"


def packed(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this size."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Four quarters: red, green, blue, white; with some texture."""
    picture = np.zeros((height, width, 3), np.uint8)
    for rows, columns, colour in ((0, 0, (220, 30, 30)), (0, 1, (30, 200, 30)), (1, 0, (30, 30, 220)), (1, 1, (240, 240, 240))):
        picture[rows * height // 2:(rows + 1) * height // 2, columns * width // 2:(columns + 1) * width // 2] = colour
    return Image.fromarray(np.clip(picture + np.random.default_rng(0).integers(0, 15, picture.shape), 0, 255).astype(np.uint8))


def kinds() -> dict[str, tuple[bytes, str, str]]:
    """File name -> (bytes, what 01 must make of it, what the others must)."""
    rgb = scene()
    grey, found = np.asarray(rgb.convert("L")), {}
    jpeg, png, webp = packed(rgb, "JPEG"), packed(rgb, "PNG"), packed(rgb, "WEBP", lossless=True)

    def add(name, data, first=BAD, others=None):
        found[name] = (data, first, others or first)
    for tenth in range(10):
        add(f"cut{tenth}.jpg", jpeg[:len(jpeg) * tenth // 10])
        add(f"cut{tenth}.png", png[:len(png) * tenth // 10])
        add(f"cut{tenth}.webp", webp[:len(webp) * tenth // 10])
    add("a_jpeg.png", jpeg, READ)
    add("a_png.jpg", png, READ)
    add("a_gif.png", packed(rgb, "GIF"), BAD, READ)
    add("a_bmp.jpg", packed(rgb, "BMP"), BAD, READ)
    add("a_tiff.jpg", packed(rgb, "TIFF"), BAD, READ)
    add("text.png", b"this is no picture", BAD)
    add("page.jpg", b"<!doctype html><title>403 Forbidden</title>", BAD)
    add("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", BAD)
    add("zeros.png", bytes(5000), BAD)
    add("noise.jpg", np.random.default_rng(1).bytes(5000), BAD)
    add("dot.png", packed(Image.new("RGB", (1, 1)), "PNG"), BAD, READ)
    add("thread.png", packed(Image.new("RGB", (1, 3000)), "PNG"), BAD, EITHER)
    add("huge.png", claims(50_000, 50_000))
    add("endless.png", claims(2**31 - 1, 2**31 - 1))
    add("huge.jpg", jpeg.replace(struct.pack(">HH", 64, 96), struct.pack(">HH", 60_000, 60_000), 1))
    add("no_size.png", claims(0, 0))
    add("grey.png", packed(rgb.convert("L"), "PNG"), READ)
    add("one_bit.png", packed(rgb.convert("1"), "PNG"), READ)
    add("16_bit_grey.png", packed(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), READ)
    add("16_bit_tiff.png", packed(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"), BAD, READ)
    add("cmyk.jpg", packed(rgb.convert("CMYK"), "JPEG"), READ)
    add("progressive.jpg", packed(rgb, "JPEG", progressive=True), READ)
    add("palette.png", packed(rgb.quantize(16), "PNG"), READ)
    add("palette_alpha.png", packed(rgb.quantize(16), "PNG", transparency=0), READ)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))))
    add("alpha.png", packed(alpha, "PNG"), READ)
    add("alpha.webp", packed(alpha, "WEBP"), READ)
    add("grey_alpha.png", packed(alpha.convert("LA"), "PNG"), READ)
    add("clear.png", packed(Image.new("RGBA", (96, 64)), "PNG"), READ)
    frames = [rgb.rotate(90 * k) for k in range(3)]
    add("animated.png", packed(rgb, "PNG", save_all=True, append_images=frames), READ)
    add("animated.webp", packed(rgb, "WEBP", save_all=True, append_images=frames), READ)
    add("animated_gif.webp", packed(rgb, "GIF", save_all=True, append_images=frames), BAD, READ)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        add(f"exif{turn}.jpg", packed(rgb, "JPEG", exif=exif), READ)
    exif = Image.Exif()
    exif[0x0112] = 77
    add("exif_nonsense.jpg", packed(rgb, "JPEG", exif=exif), READ)
    add("exif_broken.jpg", packed(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(40)), EITHER)
    add("icc_broken.jpg", packed(rgb, "JPEG", icc_profile=b"nonsense" * 20), READ)
    add("float_nan.png", packed(Image.fromarray(np.full((64, 96), np.nan, np.float32)), "TIFF"))
    add("float.png", packed(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"))
    add("int32.png", packed(Image.fromarray(grey.astype(np.int32) * 9000), "TIFF"))
    for name, data in (("jpg", jpeg), ("png", png), ("webp", webp)):
        scarred = bytearray(data)
        scarred[len(data) // 2:len(data) // 2 + 40] = bytes(40)
        add(f"scarred.{name}", bytes(scarred), EITHER)
    add("checksum.png", png[:-20] + bytes(4) + png[-16:], EITHER)
    add("tail.png", png + b"more" * 1000, READ)
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 80_000_000, zip=True)
    add("text_bomb.png", packed(rgb, "PNG", pnginfo=info))
    add("na me\n\"quoted\" ünï.png", png, READ)
    return found


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """The files, and what is no file: a link out of the folder, a broken one, a folder, a pipe. -> name -> (for 01, for the others)."""
    folder.mkdir(parents=True)
    wanted = {}
    for name, (data, first, others) in kinds().items():
        (folder / name).write_bytes(data)
        wanted[name] = (first, others)
    scene().save(folder.parent.parent / "secret.png")
    os.symlink("../../secret.png", folder / "link_out.png")
    os.symlink("nowhere.png", folder / "link_broken.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    return wanted | {"link_out.png": (BAD, BAD), "link_broken.png": (EITHER, BAD), "folder.png": (EITHER, BAD), "pipe.png": (EITHER, BAD)}


def judge(row: Row, outcome, wanted: dict[str, str], came_through: set[str] | None):
    """One case a picture. It is named when its name stands on stderr; came_through: those found in the output, where a stage tells."""
    if outcome.status:
        row.complaints.append(f"{row.attack}: status {outcome.status} after {outcome.seconds:.0f} s: {outcome.err[-1500:]}")
    for name, want in wanted.items():
        shown = name.split("\n")[-1]  # a name's second line, where it has one
        named = shown in outcome.err
        through = not named if came_through is None else name in came_through
        faults = [] if want == EITHER or (want == READ) == through else [f"it should be {want}, and {'came through' if through else 'did not'}"]
        faults += [] if through or named or want == EITHER else ["it is not named"]
        row.case(name, ["the stage failed"] * bool(outcome.status) + faults, lost=int(want == READ and not through))
    row.tracebacks += "Traceback" in outcome.err


def through_01(place: Path) -> Row:
    row, wanted = Row("01 over bad pictures"), write(place / "mine/photos")
    done = run("01", "--run", place / "run", "--images", place / "mine/photos", "--actions", "turns", "--photo_trajectories", 1)
    records = [json.loads(line) for line in (place / "run/1_trajectories/trajectories.jsonl").read_text().splitlines()]
    judge(row, done, {name: first for name, (first, _) in wanted.items()}, {Path(record["anchor"]).name for record in records})
    return row


def through_02(place: Path) -> Row:
    """As if 01 had let every picture pass. What comes through must also look like the scene: red above on the left, blue below."""
    row, wanted = Row("02 over bad pictures"), write(place / "mine/photos")
    run("01", "--run", place / "run", "--images", place / "mine/photos/tail.png", "--actions", "turns", "--photo_trajectories", 1)
    path = place / "run/1_trajectories/trajectories.jsonl"
    record, names = json.loads(path.read_text()), {f"s{k}": name for k, name in enumerate(wanted)}
    sides = {name: (64, 96) if name in ("exif5.jpg", "exif6.jpg", "exif7.jpg", "exif8.jpg") else (96, 64) for name in wanted}
    path.write_text("".join(json.dumps(record | {"scene_id": scene, "anchor": str(place / "mine/photos" / name), "width": sides[name][0],
                                                 "height": sides[name][1]}) + "\n" for scene, name in names.items()))
    done = run("02", "--run", place / "run", "--teacher", "warp", "--workers", 1, "--keep", "ends")
    views = [json.loads(line) for line in (place / "run/2_views/views.jsonl").read_text().splitlines()] if not done.status else []
    wanted["link_out.png"] = (EITHER, EITHER)  # 02 is handed paths by 01, which refuses this one
    judge(row, done, {name: others for name, (_, others) in wanted.items()}, {names[view["scene_id"]] for view in views})
    for view in views:
        if (name := names[view["scene_id"]]).startswith("exif") and name[4].isdigit():
            with Image.open(place / "run" / view["frames"][0]) as frame:
                seen = corners(np.asarray(frame))
            row.case(f"{name} upright", [] if seen == turned(int(name[4])) else [f"its corners are {seen}"])
    return row


def corners(picture: np.ndarray) -> str:
    """The colours of the quarters, row by row: "RGBW"."""
    height, width, _ = picture.shape
    middle = [picture[height * y // 4, width * x // 4].astype(int) for y in (1, 3) for x in (1, 3)]
    return "".join("W" if min(colour) > 150 else "RGB"[int(np.argmax(colour))] for colour in middle)


def turned(orientation: int) -> str:
    """The quarters RGBW as the EXIF orientation asks to show them (EXIF 2.32, tag 274: where row 0 and column 0 of the file lie)."""
    return {1: "RGBW", 2: "GRWB", 3: "WBGR", 4: "BWRG", 5: "RBGW", 6: "BRWG", 7: "WGBR", 8: "GWRB"}[orientation]


def through_training(stage: str, whole: Path, place: Path) -> Row:
    """A question about each picture through 04, 05 or 06."""
    row, folder = Row(f"{stage} over bad pictures"), before(stage, whole, place / "run")
    wanted = {name: others for name, (_, others) in write(folder / "photos").items()}
    question = {"task_type": "A2", "messages": [{"role": "user", "content": "<image>Which way?"}, {"role": "assistant", "content": "turn left 10 degrees"}]}
    (folder / "all.jsonl").write_text("".join(json.dumps(question | {"scene_id": name, "images": [f"photos/{name}"]}) + "\n" for name in wanted))
    if stage == "06":
        done = run(stage, "--run", folder, "--checkpoint", "4_base", "--questions", "all.jsonl", "--tag", "pictures", "--max_new_tokens", 2,
                   "--max_pixels", 3136, "--blank", "False")
        path = folder / "6_eval/pictures/samples.jsonl"
        judge(row, done, wanted, {json.loads(line)["scene_id"] for line in path.read_text().splitlines()} if path.is_file() else set())
    else:
        more = ["--batch", 999, "--val_share", 0] if stage == "04" else ["--prompts", len(wanted), "--group", 2, "--max_new_tokens", 2]
        done = run(stage, "--run", folder, "--student", "4_base", "--data", "all.jsonl", *TINY, "--steps", 1, "--max_pixels", 3136, *more)
        judge(row, done, wanted, None)
        if stage == "04" and not done.status:
            asked = json.loads((folder / "4_sft/metrics.jsonl").read_text())["questions"]
            read = sum(want == READ for want in wanted.values())
            row.case("the number of questions trained", [] if asked >= read else [f"{asked} of {read}"], lost=max(0, read - asked))
    return row
