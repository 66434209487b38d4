"""What XLA made of a step: how many kernels it launches."""

import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_KERNEL = re.compile(r"\s(?:fusion|custom-call|copy|copy-start|reduce|broadcast|dot|sort)\(")


def launches(compiled: str) -> int:
    """Kernels of a compiled program's text: fusions, and the operations that stand outside of any.

    Each computation is counted once, whatever branches or loops around it do.
    """
    inner = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", compiled))
    graphs = {name for name in inner if name.startswith("command_buffer")}  # of kernels, launched together
    return sum(
        len(_KERNEL.findall(body)) for name, body in _COMPUTATION.findall(compiled) if name not in inner - graphs
    )
