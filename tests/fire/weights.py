"""Bad weights: 04, 05 and 06 refuse them with one line that says what is wrong; 02 the depth network of warp likewise."""
import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
from harness import STAGES, Row, before, run
from safetensors.numpy import load_file, save_file

NAME = "model.language_model.layers.0.mlp.up_proj.weight"


def spoil(folder: Path) -> dict[str, tuple]:
    """Attack -> (what it does to a checkpoint folder, words that the refusal must hold)."""
    file = folder / "model.safetensors"
    weights, data = load_file(file), file.read_bytes()

    def put(change):
        return lambda: save_file(change(dict(weights)), file, metadata={"format": "pt"})

    def config(**change):
        path = folder / "config.json"
        return lambda: path.write_text(json.dumps(json.loads(path.read_text()) | change))

    def rename(old, new):
        return lambda: (folder / old).rename(folder / new)

    def pickled(name):
        def act():
            file.unlink()
            (folder / name).write_bytes(pickle.dumps({NAME: weights[NAME]}))
        return act
    nan, infinite = weights[NAME].copy(), weights[NAME].copy()
    nan[0, 0], infinite[3, 3] = np.nan, np.inf
    attacks = {f"cut at {tenth}0 %": (lambda tenth=tenth: file.write_bytes(data[:len(data) * tenth // 10]), ()) for tenth in range(10)}
    return attacks | {
        "one byte short": (lambda: file.write_bytes(data[:-1]), ()), "a byte too many": (lambda: file.write_bytes(data + b"\0"), ()),
        "header of 2^60 bytes": (lambda: file.write_bytes(struct.pack("<Q", 2**60) + data[8:]), ()),
        "header no JSON": (lambda: file.write_bytes(data[:8] + b"x" * 50 + data[58:]), ()),
        "zeros": (lambda: file.write_bytes(bytes(len(data))), ()), "a text": (lambda: file.write_text("version https://git-lfs.github.com/spec/v1\n"), ()),
        "wrong shape": (put(lambda w: w | {NAME: w[NAME][:, :7].copy()}), ()), "transposed": (put(lambda w: w | {NAME: w[NAME].T.copy()}), ()),
        "NaN": (put(lambda w: w | {NAME: nan}), (NAME, "not finite")), "infinity": (put(lambda w: w | {NAME: infinite}), (NAME, "not finite")),
        "a key missing": (put(lambda w: {k: v for k, v in w.items() if k != NAME}), ("missing", NAME)),
        "a layer missing": (put(lambda w: {k: v for k, v in w.items() if "layers.1." not in k}), ("missing", "layers.1.")),
        "an extra key": (put(lambda w: w | {"model.language_model.extra.weight": np.ones(3, np.float32)}), ("unexpected", "extra.weight")),
        "another model's": (put(lambda w: {f"transformer.h.{k}": v for k, v in w.items()}), ()),
        "pickle for safetensors": (pickled("pytorch_model.bin"), ()), "a pickle by that name": (pickled("model.safetensors"), ()),
        "no weights": (file.unlink, ()), "weights a folder": (lambda: (file.unlink(), file.mkdir()), ()),
        "remote code": (config(auto_map={"AutoModelForImageTextToText": "evil.Model", "AutoConfig": "evil.Config"}), ("code",)),
        "remote code for an unknown kind": (config(auto_map={"AutoConfig": "evil.Config"}, model_type="evil"), ()),
        "an unknown kind": (config(model_type="nonsense"), ()), "a text model": (config(model_type="gpt2"), ()),
        "no config": ((folder / "config.json").unlink, ()), "config no JSON": (lambda: (folder / "config.json").write_text("{"), ()),
        "config empty": (lambda: (folder / "config.json").write_text("{}"), ()), "config a list": (lambda: (folder / "config.json").write_text("[]"), ()),
        "a layer too many in config": (config(text_config=json.loads((folder / "config.json").read_text())["text_config"] | {"num_hidden_layers": 7}), ()),
        "a wrong type in config": (config(text_config=json.loads((folder / "config.json").read_text())["text_config"] | {"hidden_size": "many"}), ()),
        "no tokenizer": (rename("tokenizer.json", "other.json"), ()), "tokenizer no JSON": (lambda: (folder / "tokenizer.json").write_text("{"), ()),
        "no processor": (rename("processor_config.json", "other.json"), ())}


def refused(stage: str, whole: Path, place: Path, most: int) -> Row:
    """Every attack, or `most` of them evenly chosen. The code of a remote-code config lies beside it and would leave a file behind."""
    row = Row(f"{stage} with bad weights")
    names = [*spoil(whole / "4_base")]
    for k in np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int)):
        folder, name = before(stage, whole, place / str(k)), names[k]
        shutil.rmtree(folder / "4_base")
        shutil.copytree(whole / "4_base", folder / "4_base")
        (folder / "4_base/evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
        act, words = spoil(folder / "4_base")[name]
        act()
        done = run(stage, "--run", folder, *STAGES[stage])
        faults = done.refusal("4_base", *words) + ["its code ran"] * (place / "ran").exists()
        row.case(name, faults, done)
        shutil.rmtree(folder)
    return row
