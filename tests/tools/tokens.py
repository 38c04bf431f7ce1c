#!/usr/bin/env python3
"""Tokenizers whose special and added tokens are spread over several files, and what transformers makes of them: writes tests/data/tokens.json.

    python3 -m venv venv && venv/bin/pip install transformers==5.24.0
    venv/bin/python tests/tools/tokens.py

tests/tokens.rs reads the same files and compares. Nothing in `make test` needs transformers.
"""

import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

DATA = Path(__file__).parent.parent / "data"
TEXTS = [
    "once upon", "<s>once upon</s> on", "<|im_start|>user\nonce<|im_end|>\n", "  two  spaces", "", " <|im_end|> a", "né 東", "<pad><image>on<extra>x", "a <extra> b", "▁once", "<unk>on", "<|im_start|> once  <|im_end|>",
]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def token(content, **flags):
    return {"content": content, **FLAGS, **flags}


def added(tokens):
    return [{"id": index, **token(content)} for index, content in tokens]


def around(bos):
    start = [{"SpecialToken": {"id": bos, "type_id": 0}}]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing", "single": start + text, "pair": start + text + [{"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}},
    }  # fmt: skip


def sentence_piece():
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + list("▁abcdeinoprstux<>|_\n")
    merges = ["o n", "c e", "on ce", "▁ once", "u p", "up on", "▁ upon", "▁ on", "▁ ▁", "u s", "us e", "use r", "▁ a"]
    pieces += [merge.replace(" ", "") for merge in merges]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added(enumerate(pieces[:3])),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None, "post_processor": around("<s>"),
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": [merge.split(" ") for merge in merges]},
    }  # fmt: skip


def byte_level():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [chr(byte) if byte in printable else chr(256 + sum(other not in printable for other in range(byte))) for byte in range(256)]
    merges = ["o n", "c e", "on ce", "Ġ once", "u p", "up on", "Ġ upon"]
    pieces = ["<unk>", "<s>", "</s>"] + names + [merge.replace(" ", "") for merge in merges]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added(enumerate(pieces[:3])), "normalizer": None, "pre_tokenizer": level, "post_processor": around("<s>"), "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": merges},
    }  # fmt: skip


BASES = {"pieces": sentence_piece(), "bytes": byte_level()}
SIZE = {name: len(base["model"]["vocab"]) for name, base in BASES.items()}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT = ["<|im_start|>", "<|im_end|>"]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {"tokenizer_class": "LlamaTokenizerFast"}


def listed(base, tokens, start=0, **flags):
    return {str(SIZE[base] + start + index): token(content, **flags) for index, content in enumerate(tokens)}


# By name: the tokenizer.json, the model's type, and the other files.
CASES = {
    "plain": ("pieces", "llama", {"tokenizer_config.json": {**FAST, **NAMES}}),
    "the class of Llama": ("pieces", "llama", {"tokenizer_config.json": {**LLAMA, **NAMES}}),
    "the class of Llama, as it was": ("pieces", "llama", {"tokenizer_config.json": {**LLAMA, **NAMES, "legacy": True}}),
    "the class of Llama without a space": ("pieces", "llama", {"tokenizer_config.json": {**LLAMA, **NAMES, "add_prefix_space": False}}),
    "the class of Llama, named in config.json": ("pieces", "llama", {"tokenizer_config.json": NAMES, "config.json": LLAMA}),
    "the class of Llama over bytes": ("bytes", "llama", {"tokenizer_config.json": {**LLAMA, **NAMES}}),
    "the class of Llama for Mistral": ("pieces", "mistral", {"tokenizer_config.json": {**LLAMA, **NAMES}}),
    "added_tokens_decoder": ("pieces", "llama", {"tokenizer_config.json": {**LLAMA, **NAMES, "eos_token": CHAT[1], "added_tokens_decoder": listed("pieces", CHAT)}}),
    "added_tokens_decoder over bytes": ("bytes", "qwen3", {"tokenizer_config.json": {**FAST, **NAMES, "eos_token": CHAT[1], "added_tokens_decoder": listed("bytes", CHAT)}}),
    "added_tokens.json": ("pieces", "llama", {"tokenizer_config.json": {**LLAMA, **NAMES, "eos_token": CHAT[1]}, "added_tokens.json": {text: SIZE["pieces"] + index for index, text in enumerate(CHAT)}}),
    "added_tokens.json, plain": ("bytes", "llama", {"tokenizer_config.json": {**FAST, **NAMES}, "added_tokens.json": {text: SIZE["bytes"] + index for index, text in enumerate(CHAT)}}),
    "special_tokens_map.json": ("pieces", "llama", {"tokenizer_config.json": FAST, "special_tokens_map.json": {**NAMES, "eos_token": token(CHAT[1], normalized=True), "additional_special_tokens": ["<extra>", CHAT[0]]}}),
    "special_tokens_map.json beside added_tokens_decoder": ("pieces", "llama", {"tokenizer_config.json": {**FAST, **NAMES, "added_tokens_decoder": listed("pieces", CHAT)}, "special_tokens_map.json": {"eos_token": CHAT[1], "pad_token": "<pad>"}}),
    "additional_special_tokens": ("bytes", "llama", {"tokenizer_config.json": {**FAST, **NAMES, "additional_special_tokens": ["<extra>", *CHAT]}}),
    "a pad token that is nowhere else": ("pieces", "llama", {"tokenizer_config.json": {**FAST, **NAMES, "pad_token": "<pad>"}}),
    "the model's own names": ("pieces", "llama", {"tokenizer_config.json": {**FAST, **NAMES, "image_token": "<image>", "extra_special_tokens": {"extra_token": "<extra>"}}}),
    "blanks belong to the token": ("pieces", "llama", {"tokenizer_config.json": {**FAST, **NAMES, "added_tokens_decoder": listed("pieces", CHAT, lstrip=True, rstrip=True)}}),
    "a word of its own": ("bytes", "llama", {"tokenizer_config.json": {**FAST, **NAMES, "added_tokens_decoder": {**listed("bytes", ["<extra>"], special=False), str(BASES["bytes"]["model"]["vocab"]["on"]): token("on", single_word=True)}}}),
    "another id": ("pieces", "llama", {"tokenizer_config.json": {**FAST, **NAMES, "added_tokens_decoder": listed("pieces", CHAT, start=50)}}),
    "a gap": ("bytes", "llama", {"tokenizer_config.json": {**FAST, **NAMES}, "added_tokens.json": {CHAT[0]: SIZE["bytes"], CHAT[1]: SIZE["bytes"] + 2}}),
}


def main():
    cases = []
    for name, (base, model_type, files) in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            directory = Path(directory)
            config = {"model_type": model_type, "vocab_size": 400, "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "intermediate_size": 96, "num_key_value_heads": 4, **files.get("config.json", {})}
            for file, content in {**files, "config.json": config, "tokenizer.json": BASES[base]}.items():
                (directory / file).write_text(json.dumps(content))
            tokenizer = AutoTokenizer.from_pretrained(directory)
            wanted = {int(index): value["content"] for index, value in files["tokenizer_config.json"].get("added_tokens_decoder", {}).items()}
            wanted.update({index: text for text, index in files.get("added_tokens.json", {}).items()})
            case = {"name": name, "base": base, "model_type": model_type, "files": files, "agrees": all(tokenizer.convert_tokens_to_ids(text) == index for index, text in wanted.items())}
            case["eos"], case["named"] = tokenizer.eos_token_id, tokenizer.special_tokens_map
            case["texts"] = [[text, tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)] for text in TEXTS]
            case["decoded"] = [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for _, ids, _ in case["texts"]]
            cases.append(case)
    (DATA / "tokens.json").write_text(json.dumps({"bases": BASES, "cases": cases}, ensure_ascii=False) + "\n")


main()
