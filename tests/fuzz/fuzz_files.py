"""Damaged files: bytes, JSON, safetensors, rows; and the cases that are made of them."""

import csv
import gzip
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_world import ROWS, Case, World, good_rows

ODD = [None, True, -1, 0, 3, 1e30, float("nan"), "", "x", "\x00", [], [1, "a"], {}, {"a": {"b": 1}}, "ü" * 5000, 10**30]


def damaged_bytes(random: Random, data: bytes) -> tuple[str, bytes]:
    """A name of the damage, and the bytes with it."""
    position = random.randrange(len(data) or 1)
    damages = {
        "cut": lambda: data[:position],
        "empty": lambda: b"",
        "a NUL inside": lambda: data[:position] + b"\x00" + data[position:],
        "a byte that is not UTF-8": lambda: data[:position] + b"\xff" + data[position:],
        "another byte": lambda: data[:position] + bytes([random.randrange(256)]) + data[position + 1 :],
        "zeros": lambda: bytes(len(data)),
        "other bytes": lambda: random.randbytes(50),
        "white space": lambda: b" \n\t\n",
        "a part twice": lambda: data[:position] + data[position // 2 :],
    }
    name = random.choice(sorted(damages))
    return name, damages[name]()


def damaged_json(random: Random, text: str) -> tuple[str, bytes]:
    """JSON with a value that nobody expects, or that is no JSON."""
    if random.random() < 0.3:
        return damaged_bytes(random, text.encode())
    value = json.loads(text)
    whole = random.choice(["[]", '"text"', "3", "null", "[" * 3000, "{}", "\ufeff" + text])
    if random.random() < 0.2 or not isinstance(value, dict):
        return f"all of it {whole[:9]!r}", whole.encode()
    # Into the object, up to three levels deep.
    target: Any = value
    path = []
    for _ in range(random.randrange(1, 4)):
        keys = sorted(target) if isinstance(target, dict) else range(len(target))
        if not keys:
            break
        key = random.choice(list(keys))
        path.append(key)
        if not isinstance(target[key], dict | list) or not target[key]:
            break
        parent, target = target, target[key]
    container = target if path[-1] in _keys(target) else parent
    if random.random() < 0.3:
        del container[path[-1]]
        return f"without {path}", json.dumps(value).encode()
    container[path[-1]] = random.choice(ODD)
    return f"{path} {str(container[path[-1]])[:20]!r}", json.dumps(value).encode()


def _keys(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


# Rows

ENCODERS = {
    "UTF-8 with its mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "blank lines": lambda text: text.replace("\n", "\n\n").encode(),
    "no line break at the end": lambda text: text.rstrip("\n").encode(),
    "as it should be": lambda text: text.encode(),
}
ROW_DAMAGES = {
    "deep": ("either", lambda row, r: {**row, "extra": json.loads("[" * 90 + "]" * 90)}),
    "another column": ("either", lambda row, r: {**row, "extra": r.choice(ODD)}),
    "control characters": ("accept", lambda row, r: {**row, "completion": " \x1b[31mred\x07"}),
    "a lone surrogate": ("refuse", lambda row, r: {**row, "completion": " a\ud800"}),
    "a long text": ("accept", lambda row, r: {**row, "completion": " cat" * 20_000}),
    "an empty completion": ("refuse", lambda row, r: {**row, "completion": ""}),
    "no completion": ("refuse", lambda row, r: {"prompt": row["prompt"]}),
    "null": ("refuse", lambda row, r: {**row, "completion": None}),
    "a number": ("refuse", lambda row, r: {**row, "completion": r.choice([0, -1, 1.5, True, float("nan"), 10**30])}),
    "a list": ("refuse", lambda row, r: {**row, "completion": r.choice([[], [1], ["a"], [None], [[]]])}),
    "an object": ("refuse", lambda row, r: {**row, "completion": {"a": 1}}),
    "another type of prompt": ("refuse", lambda row, r: {**row, "prompt": r.choice([None, 3, {"a": 1}, [1]])}),
    "messages": (
        "refuse",
        lambda row, r: {"messages": r.choice([None, "a", [], [1], [{}], [{"role": 1}], [{"role": "user"}], [[[]]]])},
    ),
    "ids": ("refuse", lambda row, r: {"input_ids": r.choice([[], [-1], [1.5], ["a"], None, [10**9], [[1]]])}),
}


def text_of(rows: list[dict[str, Any]], suffix: str) -> bytes:
    """Rows as a file of the format."""
    if suffix == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if suffix in ("csv", "tsv"):
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(rows[0]), delimiter="," if suffix == "csv" else "\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        return table.getvalue().encode(errors="surrogatepass")
    if suffix == "json":
        return json.dumps(rows).encode()
    if suffix == "txt":
        return "".join(f"{row.get('prompt')}{row.get('completion')}\n" for row in rows).encode(errors="surrogatepass")
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_case(random: Random, folder: Path, world: World) -> Case:
    """A file of rows."""
    suffix = random.choice(["jsonl", "json", "csv", "tsv", "parquet", "txt", "jsonl.gz"])
    rows, plain = good_rows("sft"), suffix.removesuffix(".gz")
    must, number = "either", None
    kind = random.choice(["bytes", "row", "encoding"])
    if kind == "row" and suffix in ("jsonl", "json", "jsonl.gz"):
        title = random.choice(sorted(ROW_DAMAGES))
        must, damage = ROW_DAMAGES[title]
        position = random.randrange(ROWS)
        rows[position] = damage(rows[position], random)
        data = text_of(rows, plain)
    elif kind == "encoding" and suffix in ("jsonl", "csv", "tsv", "txt"):
        title, must, number = random.choice(sorted(ENCODERS)), "accept", ROWS
        data = ENCODERS[title](text_of(rows, plain).decode())
    else:
        title, data = damaged_bytes(random, text_of(rows, plain))
        must = "refuse" if title in ("empty", "white space") else "either"
    file = folder / f"rows.{suffix}"
    compressed = gzip.compress(data) if suffix.endswith("gz") else data
    file.write_bytes(
        compressed[: len(compressed) // 2] if random.random() < 0.1 and suffix.endswith("gz") else compressed
    )
    if len(file.read_bytes()) < len(compressed):
        title, must, number = "half of it", "refuse", None
    # Reading is the same in all commands; a few go on to training.
    if random.random() < 0.12:
        return Case("rows", f"{suffix}: {title}", world.words("sft", folder, data=file), must, (file.name,))
    words = ["data", str(file), "--model_name_or_path", str(world.path("model")), "--command", "sft"]
    return Case("rows", f"{suffix}: {title}", words, must, (file.name,), rows=number)


# Models

JSON_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def model_case(random: Random, folder: Path, world: World) -> Case:
    """A model's folder with a damaged file."""
    place = world.copy(random.choice(["model", "model", "shards"]), folder)
    name = random.choice(JSON_FILES + ["model.safetensors.index.json"] * (place.name == "shards"))
    file = place / name
    if random.random() < 0.1:
        file.unlink()
        must = "refuse" if name in ("config.json", "model.safetensors.index.json") else "either"
        title = f"no {name}"
    else:
        title, data = damaged_json(random, file.read_text())
        title, must = f"{name}: {title}", "either"
        file.write_bytes(data)
    words = world.words(random.choice(["sft", "sft", "dpo", "reward"]), folder, model=place)
    return Case("model", title, words, must, () if "tokenizer_config" in title else (name, place.name))


def weights_case(random: Random, folder: Path, world: World) -> Case:
    """Weights that are damaged, missing, renamed or of another shape."""
    which = random.choice(["model", "shards", "reward"])
    place = world.copy(which, folder)
    file = random.choice(sorted(place.glob("*.safetensors")))
    title, data, must = damaged_weights(random, file.read_bytes())
    file.write_bytes(data)
    words = world.words("reward" if which == "reward" else random.choice(["sft", "dpo"]), folder, model=place)
    return Case("weights", f"{which}: {title}", words, must, (file.name, place.name))


def damaged_weights(random: Random, data: bytes) -> tuple[str, bytes, str]:
    """A damage of a safetensors file, and whether it must be refused."""
    size = int.from_bytes(data[:8], "little")
    header, weights = json.loads(data[8 : 8 + size]), data[8 + size :]
    tensors = sorted(set(header) - {"__metadata__"})
    name = random.choice(tensors)

    def written(changed: dict[str, Any]) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + weights

    def with_entry(**entry: Any) -> bytes:
        return written({**header, name: {**header[name], **entry}})

    renamed = {("model.nowhere" if key == name else key): value for key, value in header.items()}
    shape = header[name]["shape"]
    damages = {
        "a tensor renamed": lambda: written(renamed),
        "another shape": lambda: with_entry(shape=[*shape[:-1], shape[-1] // 2, 2]),
        "another type": lambda: with_entry(dtype=random.choice(["I32", "F128", "X", None])),
        "offsets beyond the end": lambda: with_entry(data_offsets=[0, 10**9]),
        "a header of another length": lambda: (size + random.choice([1, 2**40])).to_bytes(8, "little") + data[8:],
        "cut": lambda: data[: random.randrange(len(data))],
        "empty": lambda: b"",
        "NaN": lambda: data[: 8 + size] + b"\xff" * len(weights),
    }
    title = random.choice(sorted(damages))
    return f"{title} ({name})", damages[title](), "refuse"


def adapter_case(random: Random, folder: Path, world: World) -> Case:
    """An adapter's folder with a damaged file."""
    place = world.copy("adapter", folder)
    must = "either"
    if random.random() < 0.6:
        file = place / "adapter_config.json"
        title, data = damaged_json(random, file.read_text())
    else:
        file = place / "adapter_model.safetensors"
        title, data, must = damaged_weights(random, file.read_bytes())
    file.write_bytes(data)
    return Case("adapter", f"{file.name}: {title}", world.words("sft", folder, model=place), must, (place.name,))


def folder_case(random: Random, folder: Path, world: World) -> Case:
    """A run that is resumed, or a teacher's folder, with a damaged file."""
    if random.random() < 0.5:
        place = world.copy("run", folder).rename(folder / "out")
        checkpoint = sorted(place.glob("checkpoint-*"))[0]
        file = random.choice(sorted(path for path in checkpoint.iterdir() if path.is_file()))
        words = [*world.words("sft", folder), "--resume", "--max_steps", "2"]
        kind, names = "checkpoint", (file.name, checkpoint.name, "checkpoint")
    else:
        place = world.copy("teacher", folder)
        file = random.choice(sorted(path for path in place.iterdir() if path.is_file()))
        words = world.words("distill", folder)
        at = words.index("--teacher_model_name_or_path")
        words[at : at + 2] = ["--teacher_file", str(place)]
        kind, names = "teacher", (file.name, "teacher")
    is_json = file.suffix == ".json"
    title, data = damaged_json(random, file.read_text()) if is_json else damaged_bytes(random, file.read_bytes())
    file.write_bytes(data)
    return Case(kind, f"{file.name}: {title}", words, "either", names)
