"""GGUF files: the numbers of the gguf package, and the same model and tokens in transformers."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import call, normal, random_weights
from gguf.quants import quantize as peer_quantize

from tinyfm import tokenizer
from tinyfm.adapt import chat
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.hub import __main__ as hub
from tinyfm.hub.gguf import FORMATS, encode_tensor, save
from tinyfm.recipes.gpt import STYLES

transformers.logging.set_verbosity_error()
TEXT = "naïve 中文 🙂  two  spaces\n\ndef f(x):\n    return 12345 + x"
FORMAT = {"int8": gguf.GGMLQuantizationType.Q8_0, "int4": gguf.GGMLQuantizationType.Q4_0}


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_have_the_bytes_of_the_gguf_package(kind):
    x = normal(300, 64).numpy() * np.float32(0.02)
    x[3] = 0
    x[4] = np.float32(1.0)
    x[5, :32] = np.linspace(-127, 127, 32).round() / 2  # halves
    x[6] = np.float32(1e-6)
    number, data = encode_tensor(x, kind)
    assert number == FORMAT[kind]
    assert data == peer_quantize(x, FORMAT[kind]).tobytes()
    assert encode_tensor(x[:, :48], kind)[0] == gguf.GGMLQuantizationType.F32


def build(style: str, kind: str, text: str) -> tuple[GPT, tokenizer.Tokenizer]:
    own = tokenizer.train(kind, [text] * 3, 257 if kind == "bytes" else 400)
    # transformers assumes heads of 128 in a Qwen3, and 1024 positions in a GPT-2.
    options = STYLES.get(style, {"n_kv_head": 1, "d_head": 128})
    # Some ids have no token.
    config = GPTConfig(own.vocab_size + 3, 1024, 2, 2, d_model=64, d_ff=256, **options)
    return random_weights(lambda: GPT(config)), own


@pytest.fixture(scope="module")
def words(text):
    return text.read_text(encoding="utf-8")[:8000]


@pytest.mark.parametrize("style, kind", [("", "sentencepiece"), ("gpt2", "bpe"), ("gpt2", "bytes")])
@torch.no_grad()
def test_transformers_reads_the_same_model(style, kind, words, tmp_path):
    model, own = build(style, kind, words)
    save(model, own, tmp_path / "a.gguf", "a")
    found = {"gguf_file": "a.gguf"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **found).eval()
    ids = torch.tensor([own.encode(words[:40])[:30]])
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    if kind != "bytes":  # transformers needs a merge
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path, **found)
        for each in (words[100:300], TEXT):
            # It puts a space before the first word, whatever the file says.
            start = " " if kind == "sentencepiece" else ""
            assert peer.encode(each, add_special_tokens=False) == own.encode(start + each)


def test_a_file_is_read_back(words, tmp_path):
    model, own = build("", "sentencepiece", words)
    own.chat_template = chat.JINJA
    save(model, own, tmp_path / "a.gguf", "my run", "int4")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen3" and fields["general.name"] == "my run"
    assert fields["tokenizer.chat_template"] == chat.JINJA
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert fields["qwen3.attention.key_length"] == 128 and fields["qwen3.context_length"] == 1024
    assert fields["qwen3.attention.head_count_kv"] == 1 and fields["qwen3.rope.freq_base"] == 10_000
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    # llama.cpp refuses other whole numbers.
    assert reader.fields["tokenizer.ggml.token_type"].types[1] == gguf.GGUFValueType.INT32
    assert len(tokens) == model.config.vocab_size
    assert tokens[own.eot] == "<|endoftext|>" and kinds[own.eot] == gguf.TokenType.CONTROL
    assert kinds[tokens.index("<0x41>")] == gguf.TokenType.BYTE
    assert kinds[-3:] == [gguf.TokenType.UNUSED] * 3
    formats = {each.name: each.tensor_type.name for each in reader.tensors}
    assert formats["token_embd.weight"] == formats["output.weight"] == "Q8_0"
    assert formats["blk.1.ffn_down.weight"] == "Q4_0" and formats["blk.1.attn_norm.weight"] == "F32"
    for each in reader.tensors:
        if each.name == "blk.1.ffn_up.weight":
            weight = model.blocks[1].mlp.up.weight.detach().numpy()
            assert np.array_equal(each.data, peer_quantize(weight, FORMAT["int4"]))
            assert each.shape.tolist() == [64, 256]


def test_what_no_file_can_hold(words, tmp_path):
    model, own = build("llama", "bpe", words)
    with pytest.raises(ValueError, match=r"is a LlamaForCausalLM.*Qwen3ForCausalLM"):
        save(model, own, tmp_path / "a.gguf", "a")
    model, own = build("", "sentencepiece-unigram", words)
    with pytest.raises(ValueError, match=r"no tokenizer as this one.*--data.tokenizer bpe"):
        save(model, own, tmp_path / "a.gguf", "a")
    assert not list(tmp_path.iterdir())


def test_the_command(tiny_run, tmp_path, capsys):
    file = tmp_path / "tiny.gguf"
    words = [tiny_run, "--gguf", file, "--quantize", "int8"]
    hub.main(list(map(str, words)))
    assert f"{file}, 0.0 MB" in capsys.readouterr().out and file.read_bytes()[:4] == b"GGUF"
    for words, advice in (
        ([tiny_run, "--gguf", file], "--overwrite"),
        ([tiny_run, "--gguf", tmp_path], "name a new file"),
        ([tiny_run, "--gguf", tmp_path / "no" / "a.gguf"], "a folder that exists"),
        ([tiny_run], "--gguf FILE"),
        ([tiny_run, "folder", "--gguf", "a"], "--gguf FILE"),
        ([tiny_run, "folder", "--quantize", "int8"], "add --gguf FILE"),
    ):
        assert call(hub, *words) != 0, words
        assert advice in capsys.readouterr().err
