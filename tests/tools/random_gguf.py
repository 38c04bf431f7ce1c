#!/usr/bin/env python3
"""Writes a GGUF file of random weights in the layout of Q4_K_M, to measure time and memory with.

    python3 tests/tools/random_gguf.py /tmp/8b.gguf            # the shape of Llama 3 8B, 4.9 GB
    python3 tests/tools/random_gguf.py /tmp/tiny.gguf --shape tiny

Weights have the variance 1/inputs, so that activations stay finite. Its tokenizer knows bytes.
"""

import argparse
import os
import struct

# layers, width, inner width, heads, key/value heads, vocabulary
SHAPES = {"8b": (32, 4096, 14336, 32, 8, 128256), "tiny": (4, 256, 512, 4, 2, 512)}
CONTEXT = 8192
F32, Q4_K, Q6_K = 0, 12, 14
# Numbers of a block, and its bytes.
BLOCKS = {Q4_K: (256, 144), Q6_K: (256, 210)}
# Different blocks of a type and width; after these they are the same again, from another one on.
DIFFERENT = 8191


def half(x):
    return struct.pack("<e", x)


def random_blocks(kind, inputs, count):
    """Blocks with random codes and sub-scales, and scales by which numbers have the right variance."""
    spread = inputs**-0.5
    size = BLOCKS[kind][1]
    blocks = bytearray(os.urandom(size * count))
    for start in range(0, size * count, size):
        if kind == Q4_K:
            blocks[start : start + 2] = half(0.0046 * spread)
            blocks[start + 2 : start + 4] = half(0.034 * spread)
            # Six bits each, of which the highest is set.
            for at in range(start + 4, start + 12):
                blocks[at] |= 0xA0
        else:
            blocks[start + 208 : start + 210] = half(0.0007 * spread)
    return bytes(blocks)


def more_bits(layer, layers):
    """Which layers have values and the last projection of the MLP in Q6_K."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensors(shape):
    """Name, columns, rows (None for a vector) and type."""
    layers, width, inner, heads, kv_heads, vocabulary = shape
    kv = width // heads * kv_heads
    yield "token_embd.weight", width, vocabulary, Q4_K
    for layer in range(layers):
        better = Q6_K if more_bits(layer, layers) else Q4_K
        for name, columns, rows, kind in [
            ("attn_norm", width, None, F32),
            ("attn_q", width, width, Q4_K),
            ("attn_k", width, kv, Q4_K),
            ("attn_v", width, kv, better),
            ("attn_output", width, width, Q4_K),
            ("ffn_norm", width, None, F32),
            ("ffn_gate", width, inner, Q4_K),
            ("ffn_up", width, inner, Q4_K),
            ("ffn_down", inner, width, better),
        ]:
            yield f"blk.{layer}.{name}.weight", columns, rows, kind
    yield "output_norm.weight", width, None, F32
    yield "output.weight", width, vocabulary, Q6_K


def size(columns, rows, kind):
    if kind == F32:
        return 4 * columns
    numbers, block = BLOCKS[kind]
    return columns * rows // numbers * block


def text(value):
    value = value.encode()
    return struct.pack("<Q", len(value)) + value


def value(x):
    if isinstance(x, str):
        return struct.pack("<I", 8) + text(x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    if isinstance(x, int):
        return struct.pack("<II", 4, x)
    kind, one = (8, text) if isinstance(x[0], str) else (5, lambda item: struct.pack("<i", item))
    return struct.pack("<IIQ", 9, kind, len(x)) + b"".join(map(one, x))


def byte_tokens():
    """The characters by which byte-level tokenizers write bytes (GPT-2's table), and a pair of them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)] + ["th"]


def metadata(shape):
    layers, width, inner, heads, kv_heads, vocabulary = shape
    tokens = byte_tokens()
    tokens += [f"<|{index}|>" for index in range(len(tokens), vocabulary)]
    return {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.block_count": layers,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": width,
        "llama.feed_forward_length": inner,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": vocabulary,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3] * (vocabulary - 257),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": vocabulary - 2,
        "tokenizer.ggml.eos_token_id": vocabulary - 1,
    }


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("output")
    arguments.add_argument("--shape", choices=SHAPES, default="8b")
    arguments = arguments.parse_args()
    shape = SHAPES[arguments.shape]
    fields, all_tensors = metadata(shape), list(tensors(shape))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(all_tensors), len(fields))
    head += b"".join(text(key) + value(x) for key, x in fields.items())
    offset = 0
    for name, columns, rows, kind in all_tensors:
        dimensions = [columns] if rows is None else [columns, rows]
        head += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
        offset += -(-size(columns, rows, kind) // 32) * 32
    pool, begin = {}, 0
    with open(arguments.output, "wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for name, columns, rows, kind in all_tensors:
            if kind == F32:
                file.write(struct.pack("<f", 1.0) * columns)
            else:
                key = (kind, columns)
                if key not in pool:
                    pool[key] = random_blocks(kind, columns, DIFFERENT)
                block, left = BLOCKS[kind][1], size(columns, rows, kind)
                # No two tensors begin alike.
                begin = (begin + 1009) % DIFFERENT
                piece = pool[key][begin * block :]
                while left > 0:
                    piece = piece[:left]
                    file.write(piece)
                    left -= len(piece)
                    piece = pool[key]
            file.write(bytes(-size(columns, rows, kind) % 32))


if __name__ == "__main__":
    main()
