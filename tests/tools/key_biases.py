#!/usr/bin/env python3
"""Makes a Qwen2 with large key biases of a GGUF of Llama's architecture, to measure caches with.

    python3 tests/tools/key_biases.py SmolLM2-135M-Instruct.Q4_1.gguf /tmp/biased.gguf --norm 600

The weights stay as they are, in their blocks. In some layers no query has anything in the slowest
pair of RoPE, and every key head has a bias of this norm there: what the model computes does not
depend on the norm. With `--norm 0` it is the model to compare with; with `--layers 999`, which it
has not, it is the model that it was made of.
"""

import argparse
import struct

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, F32 = 8, 9, 0
# Numbers of a block, and its bytes: F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)}


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def number(self, code):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self):
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length : self.at]

    def value(self, kind):
        """What it is, where a number or a string; arrays are passed over."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        for _ in range(count):
            self.value(inner)
        return None


def text(value):
    return struct.pack("<Q", len(value)) + value


def read(data):
    """Metadata as key, kind, value and bytes; tensors as dimensions, type and bytes by name."""
    reader = Reader(data)
    assert data[:4] == b"GGUF"
    reader.at = 8
    tensors, fields = reader.number("Q"), reader.number("Q")
    metadata, places = [], []
    for _ in range(fields):
        key, kind = reader.string(), reader.number("I")
        start = reader.at
        value = reader.value(kind)
        metadata.append((key, kind, value, data[start : reader.at]))
    for _ in range(tensors):
        name = reader.string()
        dimensions = [reader.number("Q") for _ in range(reader.number("I"))]
        places.append((name, dimensions, reader.number("I"), reader.number("Q")))
    start = reader.at + -reader.at % 32
    found = {}
    for name, dimensions, kind, offset in places:
        numbers, size = BLOCKS[kind]
        count = 1
        for dimension in dimensions:
            count *= dimension
        found[name] = (dimensions, kind, data[start + offset :][: count // numbers * size])
    return metadata, found


def rows(tensor):
    _, _, data = tensor
    height = tensor[0][1]
    width = len(data) // height
    return [data[row * width : (row + 1) * width] for row in range(height)]


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("input")
    arguments.add_argument("output")
    arguments.add_argument("--norm", type=float, required=True)
    arguments.add_argument("--layers", type=int, nargs="+", default=[0, 15])
    arguments = arguments.parse_args()
    with open(arguments.input, "rb") as file:
        metadata, tensors = read(file.read())
    known = {key: value for key, _, value, _ in metadata}
    assert known[b"general.architecture"] == b"llama" and known.get(b"general.alignment", 32) == 32
    setting = lambda name: known[b"llama." + name]
    heads, layers = setting(b"attention.head_count"), setting(b"block_count")
    d = setting(b"embedding_length") // heads

    for layer in range(layers):
        name = lambda part: f"blk.{layer}.{part}".encode()
        for part in ["attn_q", "attn_k"]:
            dimensions, kind, _ = tensors[name(part + ".weight")]
            old = rows(tensors[name(part + ".weight")])
            # Llama's files have the two of a pair side by side, Qwen2's half a head apart.
            new = [old[head + 2 * pair + side] for head in range(0, len(old), d) for side in (0, 1) for pair in range(d // 2)]
            if part == "attn_q" and layer in arguments.layers:
                for head in range(0, len(new), d):
                    for row in (head + d // 2 - 1, head + d - 1):
                        new[row] = bytes(len(new[row]))
            tensors[name(part + ".weight")] = (dimensions, kind, b"".join(new))
        for part in ["attn_q", "attn_k", "attn_v"]:
            width = tensors[name(part + ".weight")][0][1]
            bias = [0.0] * width
            if part == "attn_k" and layer in arguments.layers:
                for head in range(0, width, d):
                    bias[head + d // 2 - 1], bias[head + d - 1] = 0.8 * arguments.norm, -0.6 * arguments.norm
            tensors[name(part + ".bias")] = ([width], F32, struct.pack(f"<{width}f", *bias))

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, kind, _, data in metadata:
        if key == b"general.architecture":
            data = text(b"qwen2")
        head += text(key.replace(b"llama.", b"qwen2.", 1)) + struct.pack("<I", kind) + data
    offset = 0
    for name, (dimensions, kind, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
        offset += len(data) + -len(data) % 32
    with open(arguments.output, "wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for _, _, data in tensors.values():
            file.write(data + bytes(-len(data) % 32))


if __name__ == "__main__":
    main()
