"""The house's own rules: imports one way, a light front door, short rooms, nothing unpickled, a whole wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "e2p"
FILES = sorted(SOURCE.rglob("*.py"))
ORDER = (
    "errors",
    "config_evaluation",
    "config",
    "config_io",
    "config_serving",
    "provenance",
    "device",
    "data",
    "users",
    "model",
    "training",
    "items",
    "evaluation",
    "tasks",
    "serving",
    "bench",
    "cli",
)
EXTRAS = ("scipy", "sklearn", "matplotlib", "implicit", "rapidfuzz", "torch_geometric", "sentence_transformers")
EXTRAS += ("peft", "trl", "datasets", "tensorboard", "faiss", "redis", "rouge_score", "nltk")
EXTRAS += ("fastapi", "starlette", "uvicorn", "prometheus_client", "orjson", "gradio", "aiohttp")
BEHIND = "e2p.serving.http"  # the one room that an extra opens; without it, it says which
HEAVY = ("torch", "transformers", "polars", "numpy", "pyarrow", "rich", "jinja2", "accelerate")


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def imported(code: str) -> Iterator[tuple[int, str]]:
    """Line and e2p module of every import, those inside functions included."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "e2p")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "e2p"):
            module = "." * node.level + (node.module or "")
            # `from e2p import config` takes a folder's name from the root; `from e2p import E2PModel` a public name.
            yield from (
                (node.lineno, f"e2p.{alias.name}" if module == "e2p" and alias.name in ORDER else module)
                for alias in node.names
            )


def faults(room: str, code: str) -> list[str]:
    """Imports of a file in ``room`` that look down, name the root, or are relative."""
    found = []
    for line, module in imported(code):
        parts = module.split(".")
        if module.startswith("."):
            found.append(f"line {line}: relative import {module}")
        elif len(parts) < 2:
            found.append(f"line {line}: imports from the package root")
        elif parts[1] not in ORDER:
            found.append(f"line {line}: {module} has no place in the order")
        elif ORDER.index(parts[1]) > ORDER.index(room):
            found.append(f"line {line}: {room} looks down at {module}")
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", [p for p in FILES if p != SOURCE / "__init__.py"], ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    assert faults(room_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("data", "from e2p.model.e2p import E2PModel"),
        ("data", "import e2p.training.run"),
        ("config", "def f():\n    from e2p.data import tables"),
        ("model", "if TYPE_CHECKING:\n    from e2p.training.trainer import E2PTrainer"),
        ("evaluation", "from e2p import E2PModel"),
        ("evaluation", "import e2p"),
        ("errors", "from e2p import config"),
        ("model", "from .backbone import FrozenBackbone"),
        ("model", "from e2p.elsewhere import x"),
        ("evaluation", "class A:\n    def f(self):\n        import e2p.cli"),
    ],
)
def test_the_check_of_imports_can_fail(room: str, code: str) -> None:
    assert len(faults(room, code)) == 1


def test_the_check_of_imports_can_pass() -> None:
    lines = ["import e2p.config", "from e2p import config", "from e2p.errors import E2PError", "import torch"]
    assert faults("model", "\n".join([*lines, "from e2p.model import e2p"])) == []


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    """Heavy packages that a fresh interpreter holds after a statement."""
    report = f"import sys; print(' '.join(m for m in {HEAVY} if m in sys.modules))"
    return set(python(f"{statement}\n{report}").splitlines()[-1].split())


def test_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import e2p; dir(e2p); e2p.__version__") == set()
    assert loaded_by("from e2p import E2PError, RunConfig") == set()


def test_the_help_page_loads_nothing_heavy() -> None:
    assert loaded_by("from e2p.cli import main; main(['--help'])") == set()
    assert loaded_by("from e2p.cli import main; main(['nonsense'])") == set()


def test_the_check_of_loading_can_fail() -> None:
    assert "numpy" in loaded_by("import numpy")


def test_the_root_offers_its_names_and_no_others() -> None:
    import e2p

    for name in e2p.__all__:
        assert getattr(e2p, name) is not None
    with pytest.raises(AttributeError, match="it offers E2PError"):
        e2p.nonsense  # noqa: B018


@pytest.mark.slow
def test_every_module_loads_with_the_core_packages_alone() -> None:
    """As after a bare `pip install e2p`: the extras' packages cannot be found."""
    modules = [".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in FILES]
    code = f"""
import sys
from importlib import import_module
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda _, name, *rest: None if name.split(".")[0] in {EXTRAS} else find(name, *rest))
from e2p.errors import MissingExtraError
for name in {modules}:
    try:
        import_module(name)
    except MissingExtraError as error:
        assert name.startswith("{BEHIND}") and "pip install 'e2p[serve]'" in str(error), name
    else:
        assert not name.startswith("{BEHIND}"), name
assert not set(sys.modules) & set({EXTRAS})
"""
    python(code)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


def unpickles(code: str) -> bool:
    """Whether code reads pickles, by torch, numpy, pandas or itself."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import) and {a.name.split(".")[0] for a in node.names} & {"pickle", "dill", "joblib"}:
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pickle", "dill", "joblib"):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if re.search(r"\btorch\.load$|\bread_pickle$|\bloads_pickle$", name):
                return True
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                return True
    return False


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_unpickled(path: Path) -> None:
    assert not unpickles(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    return torch.load('x', weights_only=True)",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_check_of_pickles_can_fail(code: str) -> None:
    assert unpickles(code)


@pytest.mark.slow
def test_a_wheel_holds_presets_templates_and_types(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel")
    (built,) = builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(built).namelist())
    wanted = {
        str(path.relative_to(SOURCE.parent))
        for path in SOURCE.rglob("*")
        if path.suffix in {".py", ".yaml", ".jinja"} or path.name == "py.typed"
    }
    assert {"e2p/presets/recommended.yaml", "e2p/evaluation/report.html.jinja", "e2p/py.typed"} <= wanted
    assert wanted <= names
    assert not [name for name in names if not name.startswith(("e2p/", "e2p-"))]
