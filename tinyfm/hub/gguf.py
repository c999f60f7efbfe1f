"""GPTs as GGUF, the one file that llama.cpp and the programs built on it read.

    magic, version, number of tensors, number of fields
    fields     (name, type, value): the settings, and the tokenizer
    tensors    (name, sizes, format, place): what lies where
    the numbers of all tensors, each from a multiple of 32 bytes on

Matrices may be in blocks of 32 numbers x along a row, with a step d for each block in float16:

    Q8_0   d = max |x| / 127    q = x / d, rounded, int8              34 bytes, 8.5 bits a number
    Q4_0   d = m / -8           q = x / d + 8, rounded, 0 ... 15      18 bytes, 4.5 bits a number

with m the x of the largest magnitude. Rows that 32 does not divide, norms, biases and positions
stay in float32. With int4, the token table and the head are in Q8_0, as in quantize.py, whose
formats differ in their steps: there they are bfloat16, and int8 has one step for a whole row.

Two architectures are written: Qwen3's, which our default config has, and GPT-2's.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyfm.bpe import GPT2_PATTERN
from tinyfm.common.files import fsync
from tinyfm.common.folders import temporary_name
from tinyfm.hub.gpt import choose_architecture, resolve
from tinyfm.hub.layout import check_tokenizer, name_pairs, translate
from tinyfm.hub.text_steps import LLAMA3_PATTERN, QWEN2_PATTERN
from tinyfm.hub.tokenizers import BYTE_TOKENS

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
BLOCK = 32  # numbers that share a step

# ---- numbers ------------------------------------------------------------------------------------


def round_half_away(x: np.ndarray) -> np.ndarray:
    """Round to the nearest; halves away from zero, as C does, and not to even numbers, as numpy."""
    return np.copysign(np.floor(np.abs(x) + np.float32(0.5)), x)


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 for 0."""
    return np.divide(1, d, out=np.zeros_like(d), where=d != 0)


def q8_0(x: np.ndarray) -> np.ndarray:
    """Blocks of float32 (n, 32) -> bytes (n, 34)."""
    d = np.abs(x).max(1, keepdims=True) / np.float32(127)
    q = round_half_away(x * inverse(d)).astype(np.int8)
    return np.concatenate([d.astype("<f2").view(np.uint8), q.view(np.uint8)], 1)


def q4_0(x: np.ndarray) -> np.ndarray:
    """Blocks of float32 (n, 32) -> bytes (n, 18). Number i is in the lower half of a byte, number
    i + 16 in the upper half."""
    m = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
    d = m / np.float32(-8)
    q = np.floor(x * inverse(d) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    q = q[:, :16] | q[:, 16:] << 4
    return np.concatenate([d.astype("<f2").view(np.uint8), q], 1)


# Number formats: their number in the file, and how to write blocks in them.
FLOAT32 = 0
FORMATS = {"int8": (8, q8_0), "int4": (2, q4_0)}
FILE_TYPES = {"none": 0, "int8": 7, "int4": 2}  # what most matrices are in


def encode_tensor(x: np.ndarray, kind: str) -> tuple[int, bytes]:
    """(number of the format, bytes) of a tensor in float32. kind: "none", "int8" or "int4"."""
    if kind == "none" or x.shape[-1] % BLOCK:
        return FLOAT32, x.astype("<f4").tobytes()
    number, encode = FORMATS[kind]
    return number, encode(x.reshape(-1, BLOCK)).tobytes()


# ---- the file -----------------------------------------------------------------------------------


def write_string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def write_value(value: Any) -> tuple[int, bytes]:
    """(number of the type, bytes) of a field's value."""
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return 8, write_string(value)
    # A list. Its whole numbers have a sign, unlike a single one.
    if value and isinstance(value[0], int):
        return 9, struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)
    parts = [write_value(each) for each in value]
    kind = parts[0][0] if parts else 8
    return 9, struct.pack("<IQ", kind, len(parts)) + b"".join(data for _, data in parts)


def write_file(path: Path, fields: dict[str, Any], tensors: Iterable[tuple]) -> None:
    """Write a file. tensors: (name, sizes, number of the format, bytes) each."""
    tensors = list(tensors)
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields))
    for name, value in fields.items():
        number, data = write_value(value)
        head += write_string(name) + struct.pack("<I", number) + data
    place = 0
    for name, sizes, number, data in tensors:
        sizes = tuple(reversed(sizes))  # the width of a row first
        head += write_string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", number, place)
        place += len(data) + -len(data) % ALIGNMENT
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(head + bytes(-len(head) % ALIGNMENT))
            for *_, data in tensors:
                file.write(data)
                file.write(bytes(-len(data) % ALIGNMENT))
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- the tokenizer ------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, ADDED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # what a token is
PATTERNS = {GPT2_PATTERN: "gpt-2", QWEN2_PATTERN: "qwen2", LLAMA3_PATTERN: "llama-bpe"}


def find_pattern(step: dict | None) -> str | None:
    """The pattern of a tokenizer.json's pre_tokenizer, if byte-level BPE follows; else None."""
    steps = [step or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN
    pattern = steps[0].get("pattern", {}).get("Regex")
    return pattern if len(steps) == 2 else None


def tokenizer_fields(spec: dict, end: int, vocab_size: int) -> dict[str, Any]:
    """The fields of a tokenizer.json. end: id of the end-of-text token.

    vocab_size: of the model; ids without a token get a name that no text has. Raises ValueError for
    a tokenizer that llama.cpp does not compute.
    """
    model = spec["model"]
    ids = dict(model["vocab"]) if model.get("type") == "BPE" else {}
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model.get("merges", [])]
    kinds = dict.fromkeys(ids.values(), NORMAL)
    pattern = find_pattern(spec["pre_tokenizer"])
    prefix = '"Prepend"' in json.dumps(spec["normalizer"])
    if ids and pattern in PATTERNS:
        fields = {"model": "gpt2", "pre": PATTERNS[pattern]}
        fields["merges"] = [" ".join(merge) for merge in merges]
    elif ids and model.get("byte_fallback"):
        # SentencePiece joins the pair with the best score: that of the earliest merge.
        ranks: dict[str, int] = {}
        for merge in merges:
            ranks.setdefault("".join(merge), len(ranks))
        scores = [0.0] * vocab_size
        for token, i in ids.items():
            scores[i] = float(-ranks.get(token, len(ranks)))
        fields = {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}
        kinds |= {ids[name]: BYTE for name in BYTE_TOKENS}
        if model.get("unk_token") in ids:
            kinds[ids[model["unk_token"]]] = UNKNOWN
            fields["unknown_token_id"] = ids[model["unk_token"]]
    else:
        raise ValueError(
            "llama.cpp has no tokenizer as this one: it takes byte-level BPE split as GPT-2, Qwen2 "
            "or Llama 3 do, or SentencePiece's BPE; train with --data.tokenizer bpe"
        )
    for token in spec["added_tokens"]:
        ids[token["content"]] = token["id"]
        kinds[token["id"]] = CONTROL if token.get("special") else ADDED
    names = {i: name for name, i in ids.items()}
    fields["tokens"] = [names.get(i, f"[unused{i}]") for i in range(vocab_size)]
    fields["token_type"] = [kinds.get(i, UNUSED) for i in range(vocab_size)]
    fields |= {"bos_token_id": end, "eos_token_id": end, "padding_token_id": end}
    fields |= {"add_bos_token": False, "add_eos_token": False}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


# ---- the model ----------------------------------------------------------------------------------

NAME_TABLE = """
token_embedding          token_embd
position_embedding       position_embd
norm                     output_norm
head                     output
blocks.*.norm1           blk.*.attn_norm
blocks.*.attention.q     blk.*.attn_q
blocks.*.attention.k     blk.*.attn_k
blocks.*.attention.v     blk.*.attn_v
blocks.*.attention.q_norm  blk.*.attn_q_norm
blocks.*.attention.k_norm  blk.*.attn_k_norm
blocks.*.attention.out   blk.*.attn_output
blocks.*.norm2           blk.*.ffn_norm
blocks.*.mlp.gate        blk.*.ffn_gate
blocks.*.mlp.up          blk.*.ffn_up
blocks.*.mlp.down        blk.*.ffn_down
"""
TABLES = ("token_embd.weight", "output.weight")
PLAIN = ("position_embd.weight",)  # always in float32


def model_fields(config: Any, name: str) -> tuple[str, dict[str, Any]]:
    """(architecture, fields) of a GPTConfig. Raises ValueError if it is neither of the two."""
    config = resolve(config)
    found = choose_architecture(config)
    kind = found.model_type
    if kind not in ("qwen3", "gpt2"):
        raise ValueError(
            f"this GPT is a {found.title}; GGUF is written for Qwen3ForCausalLM, the default "
            "config, and GPT2LMHeadModel"
        )
    if config.window or config.rope_factor != 1:
        field = "window" if config.window else "rope_factor"
        value = getattr(config, field)
        raise ValueError(f"{field} is {value}, which this layout of llama.cpp does not have")
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.d_model,
        "block_count": config.n_layer,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_head,
    }
    if kind == "gpt2":
        fields["attention.layer_norm_epsilon"] = float(config.norm_eps)
    else:
        fields["attention.head_count_kv"] = config.n_kv_head
        fields["attention.key_length"] = config.d_head
        fields["attention.value_length"] = config.d_head
        fields["attention.layer_norm_rms_epsilon"] = float(config.norm_eps)
        fields["rope.freq_base"] = float(config.rope_theta)
    general = {"general.architecture": kind, "general.type": "model", "general.name": name}
    return kind, general | {f"{kind}.{field}": value for field, value in fields.items()}


def named_tensors(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """The weights under llama.cpp's names. GPT-2's queries, keys and values are one matrix."""
    own = model.state_dict()
    if model.config.tied:
        del own["head.weight"]
    table = dict(name_pairs(NAME_TABLE, 1))
    tensors = {translate(name, table): tensor for name, tensor in own.items()}
    if kind == "gpt2":
        for name in [name for name in tensors if ".attn_q." in name]:
            parts = [tensors.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
            tensors[name.replace("attn_q", "attn_qkv")] = torch.cat(parts)
    return tensors


def save(
    model: nn.Module,
    tokenizer,
    path: str | Path,
    name: str,
    quantize: str = "none",
    overwrite: bool = False,
) -> None:
    """Write a GPT and its tokenizer as a GGUF file. quantize: "none", "int8" or "int4".

    Raises ValueError for a model or a tokenizer that this layout cannot hold, or if there is such a
    file already, unless overwrite.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} cannot be a file; name a new file in a folder that exists")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name, or add --overwrite")
    kind, fields = model_fields(model.config, name)
    check_tokenizer(tokenizer, model.config.vocab_size)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        spec = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    fields |= {"general.file_type": FILE_TYPES[quantize], "general.quantization_version": 2}
    fields |= tokenizer_fields(spec, tokenizer.eot, model.config.vocab_size)
    if tokenizer.chat_template:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    tensors = []
    for each, tensor in named_tensors(model, kind).items():
        x = tensor.float().numpy()
        form = quantize
        if x.ndim == 1 or each in PLAIN:
            form = "none"
        elif form == "int4" and each in TABLES:
            form = "int8"
        tensors.append((each, x.shape, *encode_tensor(x, form)))
    write_file(path, fields, tensors)
