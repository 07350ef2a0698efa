"""Ninety kinds of bad or odd pictures, through 01 (photographs), 02 (warp), 04, 05 and 06.

A kind is READ (every viewer shows it: it must come through), BAD (it must be named and skipped)
or EITHER (a damaged picture that some decoders show: only no traceback, and no good neighbour
lost). 01 takes JPEG, PNG and WebP of 32 pixels and more only.
"""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from harness import ASK, OUT, TRAIN, Row, before, records, run
from PIL import Image, PngImagePlugin

READ, BAD, EITHER = "read", "bad", "either"
# The quarters of the scene as EXIF 2.32, tag 274, says to show them: orientation 1 to 8.
SEEN = ["", "RGBW", "GRWB", "WBGR", "BWRG", "RBGW", "BRWG", "WGBR", "GWRB"]


def packed(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    written = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        written += struct.pack(">I", len(data)) + name + data + checksum
    return written


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def scene() -> Image.Image:
    """Four quarters: red, green, blue, white (RGBW); with some texture."""
    quarters = np.uint8([[(220, 30, 30), (30, 200, 30)], [(30, 30, 220), (240, 240, 240)]])
    picture = quarters.repeat(32, 0).repeat(48, 1)
    return Image.fromarray(
        picture + np.random.default_rng(0).integers(0, 15, picture.shape, np.uint8)
    )


def good(rgb: Image.Image) -> dict[str, bytes]:
    """Every stage reads these."""
    jpeg, png = packed(rgb, "JPEG"), packed(rgb, "PNG")
    frames = {"save_all": True, "append_images": [rgb.rotate(90 * k) for k in range(3)]}
    alpha = rgb.convert("RGBA")
    fading = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))
    alpha.putalpha(Image.fromarray(fading))
    return {
        "a_jpeg.png": jpeg,
        "a_png.jpg": png,
        "grey.png": packed(rgb.convert("L"), "PNG"),
        "one_bit.png": packed(rgb.convert("1"), "PNG"),
        "cmyk.jpg": packed(rgb.convert("CMYK"), "JPEG"),
        "progressive.jpg": packed(rgb, "JPEG", progressive=True),
        "palette.png": packed(rgb.quantize(16), "PNG"),
        "palette_alpha.png": packed(rgb.quantize(16), "PNG", transparency=0),
        "alpha.png": packed(alpha, "PNG"),
        "alpha.webp": packed(alpha, "WEBP"),
        "grey_alpha.png": packed(alpha.convert("LA"), "PNG"),
        "clear.png": packed(Image.new("RGBA", (96, 64)), "PNG"),
        "animated.png": packed(rgb, "PNG", **frames),
        "animated.webp": packed(rgb, "WEBP", **frames),
        **{f"exif{turn}.jpg": packed(rgb, "JPEG", exif=exif(turn)) for turn in range(1, 9)},
        "exif_nonsense.jpg": packed(rgb, "JPEG", exif=exif(77)),
        "icc_broken.jpg": packed(rgb, "JPEG", icc_profile=b"nonsense" * 20),
        "tail.png": png + b"more" * 1000,
        'na me\n"quoted" ünï.png': png,
    }


def not_for_01(rgb: Image.Image) -> dict[str, bytes]:
    """01 skips these kinds and sizes, the others read them."""
    frames = {"save_all": True, "append_images": [rgb.rotate(90)]}
    return {
        "a_gif.png": packed(rgb, "GIF"),
        "a_bmp.jpg": packed(rgb, "BMP"),
        "a_tiff.jpg": packed(rgb, "TIFF"),
        "animated_gif.webp": packed(rgb, "GIF", **frames),
        "dot.png": packed(Image.new("RGB", (1, 1)), "PNG"),
    }


def bad(rgb: Image.Image) -> dict[str, bytes]:
    """Every stage names these and skips them."""
    found, grey = {}, np.asarray(rgb.convert("L"))
    for kind, ending in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        data = packed(rgb, kind, lossless=True) if kind == "WEBP" else packed(rgb, kind)
        found |= {f"cut{tenth}.{ending}": data[: len(data) * tenth // 10] for tenth in range(10)}
    numbers = {
        "16_bit": grey.astype(np.uint16) * 257,
        "float_nan": np.full((64, 96), np.nan, np.float32),
        "float": grey.astype(np.float32) / 255,
        "int32": grey.astype(np.int32) * 9000,
    }
    found |= {f"{name}.png": packed(Image.fromarray(x), "TIFF") for name, x in numbers.items()}
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 80_000_000, zip=True)
    size, huge = struct.pack(">HH", 64, 96), struct.pack(">HH", 60_000, 60_000)
    return found | {
        "16_bit_grey.png": packed(Image.fromarray(numbers["16_bit"]), "PNG"),
        "text.png": b"this is no picture",
        "page.jpg": b"<!doctype html><title>403 Forbidden</title>",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "zeros.png": bytes(5000),
        "noise.jpg": np.random.default_rng(1).bytes(5000),
        "huge.png": claims(50_000, 50_000),
        "endless.png": claims(2**31 - 1, 2**31 - 1),
        "huge.jpg": packed(rgb, "JPEG").replace(size, huge, 1),
        "no_size.png": claims(0, 0),
        "text_bomb.png": packed(rgb, "PNG", pnginfo=info),
    }


def damaged(rgb: Image.Image) -> dict[str, bytes]:
    """Some decoders show these."""
    broken_exif = b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(40)
    found = {"exif_broken.jpg": packed(rgb, "JPEG", exif=broken_exif)}
    for kind in ("JPEG", "PNG", "WEBP"):
        data = packed(rgb, kind)
        half = len(data) // 2
        found[f"scarred.{kind.lower()}"] = data[:half] + bytes(40) + data[half + 40 :]
    png = packed(rgb, "PNG")
    return found | {"checksum.png": png[:-20] + bytes(4) + png[-16:]}


def write(folder: Path, every: int = 1) -> dict[str, tuple[str, str]]:
    """Write every n-th kind, and what is no file. -> name -> (what for 01, what for the others)."""
    folder.mkdir(parents=True)
    rgb, wanted = scene(), {}
    groups = [
        (good, READ, READ),
        (not_for_01, BAD, READ),
        (bad, BAD, BAD),
        (damaged, EITHER, EITHER),
    ]
    for group, first, others in groups:
        for name, data in [*group(rgb).items()][::every]:
            (folder / name).write_bytes(data)
            wanted[name] = (first, others)
    (folder / "thread.png").write_bytes(packed(Image.new("RGB", (1, 3000)), "PNG"))
    rgb.save(folder.parent.parent / "secret.png")
    os.symlink("../../secret.png", folder / "link_out.png")
    os.symlink("nowhere.png", folder / "link_broken.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    wanted |= {"thread.png": (BAD, EITHER), "link_out.png": (BAD, BAD)}
    wanted |= {"16_bit_grey.png": (EITHER, BAD)} if "16_bit_grey.png" in wanted else {}
    return wanted | dict.fromkeys(("link_broken.png", "folder.png", "pipe.png"), (EITHER, BAD))


def judge(row: Row, outcome, wanted: dict[str, str], came_through: set[str] | None):
    """One case per picture: read or named as wanted.

    came_through: the pictures in the output, where a stage tells; otherwise those not named.
    """
    failed = outcome.success()
    row.complaints += failed
    for name, want in wanted.items():
        named = name.split("\n")[-1] in outcome.err  # of a name with two lines the second one
        through = not named if came_through is None else name in came_through
        faults = ["the stage failed"] * bool(failed)
        if want != EITHER and (want == READ) != through:
            faults.append(f"it should be {want}, and {'came through' if through else 'did not'}")
        if want != EITHER and not through and not named:
            faults.append("it is not named")
        row.case(name, faults, lost=int(want == READ and not through))
    row.case("all of them", [], outcome)


def through_01(stage: str, whole: Path, place: Path, every: int) -> Row:
    row, wanted, folder = Row("01 over bad pictures"), write(place / "mine/photos"), place / "run"
    flags = f"--actions turns --photo_trajectories 1 --images {place / 'mine/photos'}"
    done = run("01", folder, flags)
    made = records(folder / "1_trajectories/trajectories.jsonl")
    came_through = {Path(record["anchor"]).name for record in made}
    judge(row, done, {name: first for name, (first, _) in wanted.items()}, came_through)
    return row


def through_02(stage: str, whole: Path, place: Path, every: int) -> Row:
    """As if 01 had let every picture pass. What comes through must also look like the scene."""
    row, photos, folder = Row("02 over bad pictures"), place / "mine/photos", place / "run"
    wanted = {name: others for name, (_, others) in write(photos, every).items()}
    wanted["link_out.png"] = EITHER  # 02 is handed paths by 01, which refuses this one
    flags = f"--actions turns --photo_trajectories 1 --images {photos / 'a_jpeg.png'}"
    run("01", folder, flags)
    path = folder / "1_trajectories/trajectories.jsonl"
    (record,), names, lines = records(path), {}, []
    for name in wanted:
        width, height = (
            (64, 96) if name in [f"exif{turn}.jpg" for turn in (5, 6, 7, 8)] else (96, 64)
        )
        own = {"scene_id": f"s{len(names)}", "anchor": str(photos / name)}
        names[own["scene_id"]] = name
        lines.append(json.dumps(record | own | {"width": width, "height": height}) + "\n")
    path.write_text("".join(lines))
    done = run("02", folder, "--teacher warp --workers 1 --keep ends")
    views = {names[view["scene_id"]]: view for view in records(folder / "2_views/views.jsonl")}
    judge(row, done, wanted, {*views})
    for name in [name for name in views if name[:-5] == "exif"]:
        with Image.open(folder / views[name]["frames"][0]) as frame:
            seen = corners(np.asarray(frame))
        faults = [f"its corners are {seen}"] * (seen != SEEN[int(name[4])])
        row.case(f"{name} upright", faults)
    return row


def corners(picture: np.ndarray) -> str:
    """The colours of the quarters, row by row: "RGBW"."""
    height, width, _ = picture.shape
    found = ""
    for y, x in ((1, 1), (1, 3), (3, 1), (3, 3)):
        colour = picture[height * y // 4, width * x // 4]
        found += "W" if min(colour) > 150 else "RGB"[int(np.argmax(colour))]
    return found


def through_training(stage: str, whole: Path, place: Path, every: int) -> Row:
    """A question about each picture through 04, 05 or 06."""
    row, folder = Row(f"{stage} over bad pictures"), before(stage, whole, place / "run")
    wanted = {name: others for name, (_, others) in write(folder / "photos").items()}
    asked = {"role": "user", "content": "<image>Which way?"}
    answer = {"role": "assistant", "content": "turn left 10 degrees"}
    with (folder / "all.jsonl").open("w") as file:
        for name in wanted:
            record = {"task_type": "A2", "messages": [asked, answer], "images": [f"photos/{name}"]}
            file.write(json.dumps(record | {"scene_id": name}) + "\n")
    flags = {
        "04": TRAIN + "--data all.jsonl --steps 1 --batch 999 --val_share 0",
        "05": TRAIN
        + f"--data all.jsonl --steps 1 --prompts {len(wanted)} --group 2 --max_new_tokens 2",
        "06": ASK + "--questions all.jsonl --pictures shown",
    }
    done = run(stage, folder, flags[stage])
    answers, results = (folder / OUT["06"] / name for name in ("samples.jsonl", "results.json"))
    answers = records(answers)
    done.err += results.read_text() if results.is_file() else ""  # 06 names all of a kind there
    judge(row, done, wanted, {one["scene_id"] for one in answers} if stage == "06" else None)
    if stage == "04" and not done.status:
        trained = records(folder / "4_sft/metrics.jsonl")[0]["questions"]
        lost = max(0, sum(want == READ for want in wanted.values()) - trained)
        row.case("the number of questions trained", [], lost=lost)
    return row
