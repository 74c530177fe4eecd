"""Who may import whom, and what a machine without extras must still import."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("kernels", "model", "data", "rl")
SOURCES = {path.relative_to(ROOT).as_posix(): path for part in PARTS for path in sorted(ROOT.glob(f"{part}/**/*.py"))}
SOURCES |= {name: ROOT / name for name in ("train.py", "eval.py")}
OURS = {*PARTS, "train", "eval", "tests"}
MAY = {"kernels": {"kernels"}, "model": {"kernels", "model"}, "data": {"data"},
       "rl": {"kernels", "rl", "data.sample", "data.chat"}, "eval.py": OURS - {"train", "tests"},
       "train.py": OURS - {"tests"}}
EXCEPTIONS = {"model/hub/pretrained.py": {"data.tokenizer"}}
LIBRARY = {name: path for name, path in SOURCES.items() if name != "kernels/bench.py"}   # it times others


def imported(text):
    """Dotted names of all modules that a source imports, anywhere in it; `from data import chat` is data.chat."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if (ROOT / f"{name.replace('.', '/')}.py").exists() else node.module for name in modules)


def breaches(name, text):
    """What a source imports of ours and may not."""
    allowed = MAY.get(name) or MAY[name.split("/")[0]]
    allowed = allowed | EXCEPTIONS.get(name, set())
    return [module for module in imported(text) if module.split(".")[0] in OURS
            and not any(module == good or module.startswith(f"{good}.") for good in allowed)]


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_only_what_it_may(name):
    assert breaches(name, SOURCES[name].read_text()) == []


@pytest.mark.parametrize("name, text", [
    ("data/x.py", "from model import clip"), ("data/x.py", "def f():\n    import rl.rewards"),
    ("model/x.py", "from data.sample import Batch"), ("model/x.py", "import rl"), ("rl/x.py", "import train"),
    ("rl/x.py", "from data import scenes"), ("rl/x.py", "from model.vlm import VLM"), ("eval.py", "import train as t"),
    ("eval.py", "from train import Config"),
    ("kernels/x.py", "import model.clip as c"), ("model/x.py", "from data.tokenizer import Tokenizer"),
    ("rl/x.py", "import data")])
def test_a_planted_import_is_caught(name, text):
    assert len(breaches(name, text)) == 1


def test_nothing_imports_train():
    assert all("train" not in imported(path.read_text()) for path in SOURCES.values())


def test_kernels_import_torch_triton_and_the_standard_library_only():
    found = {module.split(".")[0] for name, path in LIBRARY.items() if name.startswith("kernels/")
             for module in imported(path.read_text())}
    assert "torch" in found
    assert found <= {"torch", "triton", "kernels", *sys.stdlib_module_names}


def test_grpo_zero_no_source_evaluates_text():
    # A reward that called eval() hung on "99**98**97". torch's Module.eval() is a method, not this.
    for name, path in SOURCES.items():
        called = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not called & {"eval", "exec", "compile", "__import__"}, name


def test_no_high_level_training_framework_is_imported():
    found = {module.split(".")[0] for path in LIBRARY.values() for module in imported(path.read_text())}
    assert not found & {"trl", "accelerate", "deepspeed", "lightning", "pytorch_lightning", "transformers", "peft"}


@pytest.mark.parametrize("name", [*SOURCES, "setup.py", *(f"tests/{path.name}" for path in ROOT.glob("tests/*.py"))])
def test_no_line_is_longer_than_120_columns(name):
    lines = (ROOT / name).read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


def test_everything_imports_without_triton_and_without_extras():
    # triton is not published for macOS; the extras are optional by name.
    absent = ("triton", "matplotlib", "tensorboard", "tokenizers", "transformers", "trl", "hypothesis")
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in SOURCES]
    program = (f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
               f"import importlib\nfor name in {modules}: importlib.import_module(name)\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
