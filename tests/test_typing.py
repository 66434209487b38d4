"""Type checkers read the package as a user's editor does: what is right has no complaint, what is wrong has one.

`typed_user.py` and `own_parts.py` are right. Every line of MISTAKES is wrong, and must be refused where it stands.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import typed_user

TESTS = pathlib.Path(__file__).parent
RIGHT = ("own_parts.py", "typed_user.py")
MISTAKES = """
snr_adam.adamw("1e-3")
snr_adam.adamw(lr=1e-3)
snr_adam.adamw(None)
snr_adam.adamw()
snr_adam.adamw({"w": "1e-3"})
snr_adam.adamw(1e-3, storage="pack")
snr_adam.adamw(1e-3, b1="0.9")
snr_adam.lion(1e-3, eps=1e-8)
snr_adam.descend("plain")
snr_adam.descend(1e-3, descent="plain")
snr_adam.descend(1e-3, descent=EMA())
snr_adam.scale_by_snr(0.9, 0.999)
snr_adam.scale_by_snr(RMS(), EMA())
snr_adam.scale_by_snr(EMA, RMS)
snr_adam.scale_by_snr(noise="rms")
snr_adam.scale_by_snr(storage="pack")
snr_adam.scale_by_snr(storage=Packed)
snr_adam.scale_by_snr(storage=own.HeavyBall())
EMA("0.9")
"""
HEAD = "import snr_adam\nimport own_parts as own\nfrom snr_adam.parts import EMA, RMS, Packed"


def refused(name: str, files: list[pathlib.Path], cache: pathlib.Path) -> set[tuple[str, int]]:
    """File and line of every error."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    if name == "mypy":
        # Optax says nothing of its types, and what is inside of the package is for its own type checker
        options = ["--follow-imports=silent", "--disable-error-code=import-untyped", f"--cache-dir={cache}"]
        command, environment = [sys.executable, "-m", "mypy", "--strict-equality", *options], {"MYPYPATH": path}
        found = _run([*command, *map(str, files)], environment)
        return {(pathlib.Path(file).name, int(line)) for file, line in re.findall(r"(?m)^(.+?):(\d+): error:", found)}
    config = {"extraPaths": path.split(os.pathsep), "typeCheckingMode": "standard", "include": list(map(str, files))}
    (cache / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    found = json.loads(_run([*command, "-p", str(cache)], {}))["generalDiagnostics"]
    return {
        (pathlib.Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in found
        if each["severity"] == "error"
    }


def _run(command: list[str], environment: dict) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [pytest.param("mypy", marks=pytest.mark.slow), "basedpyright"])
def test_right_is_accepted_and_wrong_refused(name, request):
    """One run for both: exactly the lines with a mistake have an error."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    cache = request.config.cache.mkdir(f"typing_{name}")
    mistakes = cache / "mistakes.py"
    mistakes.write_text(HEAD + MISTAKES)
    wrong = {("mistakes.py", i + 1) for i, line in enumerate(mistakes.read_text().splitlines()) if "import" not in line}
    assert refused(name, [*(TESTS / each for each in RIGHT), mistakes], cache) == wrong


def test_what_is_right_runs(tmp_path):
    """The same script, as a program."""
    said = typed_user.train(tmp_path)
    assert said.startswith("no step skipped")
    assert said.endswith("5 reports")
