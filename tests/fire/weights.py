"""Bad weights: 04, 05 and 06 refuse them with one line that says what is wrong."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
from harness import STAGES, Row, before, run
from kill import evenly
from safetensors.numpy import load_file, save_file

NAME = "model.language_model.layers.0.mlp.up_proj.weight"
# Its code lies beside it and would leave a file behind.
REMOTE_CODE = {"AutoModelForImageTextToText": "evil.Model", "AutoConfig": "evil.Config"}


def spoil_file(folder: Path) -> dict[str, bytes]:
    """Attack -> what stands in model.safetensors."""
    data = (folder / "model.safetensors").read_bytes()
    attacks = {f"cut at {tenth}0 %": data[: len(data) * tenth // 10] for tenth in range(10)}
    return attacks | {
        "one byte short": data[:-1],
        "a byte too many": data + b"\0",
        "header of 2^60 bytes": struct.pack("<Q", 2**60) + data[8:],
        "header no JSON": data[:8] + b"x" * 50 + data[58:],
        "zeros": bytes(len(data)),
        "a text": b"version https://git-lfs.github.com/spec/v1\n",
        "a pickle by that name": pickle.dumps({NAME: np.zeros(3)}),
    }


def spoil_weights(folder: Path) -> dict[str, tuple]:
    """Attack -> (weights, words that the refusal must hold)."""
    w = load_file(folder / "model.safetensors")
    nan, infinite = w[NAME].copy(), w[NAME].copy()
    nan[0, 0], infinite[3, 3] = np.nan, np.inf
    extra = {"model.language_model.extra.weight": np.ones(3, np.float32)}
    return {
        "wrong shape": (w | {NAME: w[NAME][:, :7].copy()}, []),
        "transposed": (w | {NAME: w[NAME].T.copy()}, []),
        "NaN": (w | {NAME: nan}, [NAME, "not finite"]),
        "infinity": (w | {NAME: infinite}, [NAME, "not finite"]),
        "a key missing": ({k: v for k, v in w.items() if k != NAME}, ["missing", NAME]),
        "a layer missing": (
            {k: v for k, v in w.items() if "layers.1." not in k},
            ["missing", "layers.1."],
        ),
        "an extra key": (w | extra, ["unexpected", "extra.weight"]),
        "another model's": ({f"transformer.h.{k}": v for k, v in w.items()}, []),
    }


def spoil_config(folder: Path) -> dict[str, object]:
    """Attack -> what stands in config.json."""
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    return {
        "remote code": config | {"auto_map": REMOTE_CODE},
        "remote code for an unknown kind": config | {"auto_map": REMOTE_CODE, "model_type": "evil"},
        "an unknown kind": config | {"model_type": "nonsense"},
        "a text model": config | {"model_type": "gpt2"},
        "config empty": {},
        "config a list": [],
        "a layer too many": config | {"text_config": text | {"num_hidden_layers": 7}},
        "a wrong type in config": config | {"text_config": text | {"hidden_size": "many"}},
    }


def attacks(folder: Path) -> dict[str, tuple]:
    """Attack -> (what it does to a checkpoint folder, words that the refusal must hold)."""
    file, found = folder / "model.safetensors", {}
    for name, data in spoil_file(folder).items():
        found[name] = (lambda data=data: file.write_bytes(data)), []
    for name, (weights, words) in spoil_weights(folder).items():
        found[name] = (lambda w=weights: save_file(w, file, metadata={"format": "pt"})), words
    for name, config in spoil_config(folder).items():
        text, words = json.dumps(config), ["code"] if name == "remote code" else []
        found[name] = (lambda text=text: (folder / "config.json").write_text(text)), words
    for name in ("config.json", "tokenizer.json"):
        found[f"{name} no JSON"] = (lambda name=name: (folder / name).write_text("{")), []
    for name in ("config.json", "tokenizer.json", "processor_config.json", "model.safetensors"):
        found[f"no {name}"] = (folder / name).unlink, []

    def pickled():
        file.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({NAME: np.zeros(3)}))

    def a_folder():
        file.unlink()
        file.mkdir()

    return found | {"pickle for safetensors": (pickled, []), "weights a folder": (a_folder, [])}


def refused(stage: str, whole: Path, place: Path, most: int) -> Row:
    """Every attack, or `most` of them evenly chosen; code beside the weights never runs."""
    row, folder = Row(f"{stage} with bad weights"), place / "run"
    code = f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    for name in evenly([*attacks(whole / "4_base")], most):
        before(stage, whole, folder)
        shutil.rmtree(folder / "4_base")  # its files are links to the good ones
        shutil.copytree(whole / "4_base", folder / "4_base")
        (folder / "4_base/evil.py").write_text(code)
        act, words = attacks(folder / "4_base")[name]
        act()
        done = run(stage, folder, STAGES[stage])
        faults = done.refusal("4_base", *words) + ["its code ran"] * (folder / "ran").exists()
        row.case(name, faults, done)
        shutil.rmtree(folder)
    return row
