"""The parameter shapes that the benchmarks step."""


def tree_shapes(name: str) -> list[tuple[int, ...]]:
    """Shapes of a well-known model, of many leaves, of one leaf "4096x4096" or of a flat one of so many parameters."""
    if name in MODELS:
        return MODELS[name]()
    return [tuple(int(float(size)) for size in name.split("x"))]


def resnet50() -> list[tuple[int, ...]]:
    shapes = [(7, 7, 3, 64), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convs = [(1, 1, width_in, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            convs += [(1, 1, width_in, 4 * width)] if block == 0 else []
            for conv in convs:
                shapes += [conv, (conv[-1],), (conv[-1],)]
            width_in = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
    block += [(768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


def llama() -> list[tuple[int, ...]]:
    """The leaves of a 32-layer Llama, at a width that fits a laptop."""
    block = [(512, 512)] * 4 + [(512, 1408)] * 2 + [(1408, 512), (512,), (512,)]
    return [(32000, 512), *block * 32, (512,), (512, 32000)]


MODELS = {
    "blocks": lambda: gpt2()[1:27],
    "resnet50": resnet50,
    "gpt2": gpt2,
    "llama": llama,
    "300 leaves": lambda: (resnet50() * 2)[:300],
    "3000 leaves": lambda: [(16 * (1 + i % 6), 64 * (1 + i // 6)) for i in range(30)] * 100,
}
