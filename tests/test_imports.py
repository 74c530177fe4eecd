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
# Of a file the rule with the longest path that it lies under holds.
MAY = {"kernels": {"kernels"}, "data": {"data", "model.runs.config"}, "model": {"kernels", "model"},
       "model/hub": {"kernels", "model", "data.tokenizer"}, "model/runs": {"kernels", "model", "data.tokenizer"},
       "model/runs/config.py": set(),
       "rl": {"kernels", "rl", "data.sample", "data.chat", "data.prompting", "model.runs.config", "model.parallel",
              "model.sharding"},
       # the only file of rl that builds models: their steps are what it measures
       "rl/forecast.py": {*PARTS}, "eval.py": OURS - {"train", "tests"},
       "train.py": OURS - {"tests"}}
TIMES_OTHERS = ("kernels/bench.py", "rl/peers.py")
LIBRARY = {name: path for name, path in SOURCES.items() if name not in TIMES_OTHERS}


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
    allowed = MAY[max((place for place in MAY if f"{name}/".startswith(f"{place}/")), key=len)]
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
    ("rl/x.py", "import data"), ("data/x.py", "from model.runs import folder"), ("data/x.py", "import model.runs"),
    ("rl/x.py", "from model.runs import checkpoint"), ("model/hub/x.py", "from data import chat"),
    ("model/runs/x.py", "import rl.types"), ("model/runs/config.py", "from model.runs import presets"),
    ("model/runs/config.py", "import data.tokenizer"), ("model/hubs.py", "import data.tokenizer")])
def test_a_planted_import_is_caught(name, text):
    assert len(breaches(name, text)) == 1


@pytest.mark.parametrize("name, text", [
    ("data/x.py", "from model.runs.config import choice"), ("model/hub/x.py", "from data import tokenizer"),
    ("model/runs/x.py", "from data.tokenizer import train"), ("rl/x.py", "from model.runs import config")])
def test_what_may_be_imported_is_not_taken_for_a_breach(name, text):
    assert breaches(name, text) == []


def file_of(module):
    """A dotted name -> the file of ours that it stands for, each at its own name; "" for a folder or others' code."""
    name = f"{module.replace('.', '/')}.py"
    return name if name in SOURCES else ""


def circle(files):
    """{file: files it imports} -> files each of which imports the next, the last the first; [] if there are none."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name):]
        if name in done:
            return []
        path.append(name)
        for other in files[name]:
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    for name in files:
        if found := visit(name):
            return found
    return []


def test_no_file_imports_itself_by_way_of_others():
    files = {name: [file_of(module) for module in imported(path.read_text()) if file_of(module)]
             for name, path in SOURCES.items()}
    assert len(files["train.py"]) > 20
    assert circle(files) == []


def test_a_planted_circle_is_found():
    assert circle({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []
    assert circle({"a": ["b"], "b": ["c", "d"], "c": [], "d": ["b"]}) == ["b", "d"]
    assert circle({"a": ["a"]}) == ["a"]


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
