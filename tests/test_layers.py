"""An import goes only downwards. The tree below is the one place that says which file lies where."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "partial_fc"

# From the bottom to the top: a file may import those before it. A folder's __init__ stands after the folder's files.
LAYERS = """
errors
checks
machine
config_reader
config_types
config_data
config_train
config
permutation
sharding
memory
margins
norm_margins
emphasis
mining
normalizer
kernels.products
kernels.reference
kernels.updates
kernels.compiled
kernels.triton
kernels
models.iresnet
models.mobilefacenet
models.small
models

collectives
sampling
chunks
footprint
candidates
optim
schedule
loss_scale
divergence

step
labels
topk
forward
backward
autograd

head
partial_fc

data.order
data.files
data.table
data.crc32c
data.example
data.recordio
data.webdataset
data.tar
data.tfrecord
data.folder
data.kept
data.archives
data.sources
data.pieces
data.augment
data.decode
data.transforms
data.faults
data.stream
data.pipeline
data.dali
data.writers
data.destination
data.convert
data.class_map
data.prepare
data.findings
data.validate
data.contact_sheet
data.faces
data.synthetic
data
checkpoint.durable
checkpoint.marker
checkpoint.commits
checkpoint.tensors
checkpoint.state
checkpoint.saver
checkpoint.surgery
checkpoint.foreign
checkpoint
journal
certificates
metrics_server
metrics
evaluate.bins
evaluate.verification
evaluate.runner
evaluate
export
gallery
imprint

build

progress
preemption
council
signs
watchdog
ranks
run_status
agent
run_folder
targets
endpoint
report
status.words
status.facts
status.following
status.life
status.scrape
status.derive
status.gather
status.tables
status.view
status
phases
training_step
verify
keeper
figures
loop
train
plan
plan_report
tools
head_tools
doctor.findings
doctor.interfaces
doctor.machine
doctor.links
doctor.storage
doctor.compare
doctor.report
doctor.board
doctor
bench
demo

serve

cli_errors
cli_head
cli
__main__
""".split()

# Siblings know the data layer and those below it, not each other.
SIBLINGS = {"checkpoint", "journal", "metrics", "evaluate", "export", "gallery"}

# Below `build` modules take plain arguments. plan, bench and train stand above it.
READ_THE_CONFIGURATION = {
    "build",
    "ranks",
    "run_folder",
    "training_step",
    "verify",
    "keeper",
    "endpoint",
    "loop",
    "train",
    "plan",
    "plan_report",
    "tools",
    "head_tools",
    "doctor",
    "bench",
    "demo",
    "cli",
}
CONFIGURATION = {"config", "config_data", "config_reader", "config_train", "config_types"}

# Kernels take numbers and tensors, never objects of the loss.
OBJECTS_OF_THE_LOSS = {"margins", "norm_margins", "emphasis", "mining"}

# What `python -m` runs.
PROGRAMS = {"__main__", "agent"}

# What a module may call while it is imported: things that only define.
DEFINING_CALLS = {
    "Field",
    "ConfigDict",
    "Discriminator",
    "Tag",
    "TypeVar",
    "ParamSpec",
    "NamedTuple",
    "namedtuple",
    "NewType",
    "field",
    "frozenset",
    "range",
    "tuple",
    "list",
    "float",
    "compile",  # of re
    "pack",  # of struct
    "frombuffer",
    "dtype",
    "sqrt",
    "timedelta",
    "getattr",  # one of two names, by the version of a library
    "hasattr",
    "getLogger",
    "Typer",
    "Console",
    "Path",
    "Struct",
    "Option",
    "Argument",
}


def files() -> dict[str, Path]:
    """Module name below the package, such as ``data.order`` -> file; ``partial_fc`` is the package's own __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1] or ("partial_fc",)
        found[".".join(parts)] = path
    return found


def module_of(dotted: str) -> str:
    """The longest known module that ``a.b.c`` names: ``margins`` for ``margins.CosFace``."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in LAYERS:
            return ".".join(parts[:end])
    return "partial_fc"


def imports(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, imported name) of every import, those inside functions and for type checkers as well.

    Names inside the package come as ``partial_fc.x.y``, relative ones resolved.
    """
    package = ["partial_fc", *module.split(".")[:-1]] if module != "partial_fc" else ["partial_fc"]
    if (PACKAGE / Path(*module.split(".")) / "__init__.py").exists():
        package = ["partial_fc", *module.split(".")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"


def problems_of(module: str, source: str) -> list[str]:
    """Every broken rule of imports, one line each."""
    tree = ast.parse(source)
    found = []
    for line, name in imports(module, tree):
        top, _, rest = name.partition(".")
        if top != "partial_fc":
            if module.startswith("models") and top not in {"torch", *sys.stdlib_module_names}:
                found.append(f"{module}:{line} imports {top}; models know torch only")
            continue
        other = module_of(rest) if rest else "partial_fc"
        ours, theirs = module.split(".")[0], other.split(".")[0]
        if LAYERS.index(other) >= LAYERS.index(module) and other != module:
            found.append(f"{module}:{line} imports {other}, which lies above it")
        if {ours, theirs} <= SIBLINGS and ours != theirs:
            found.append(f"{module}:{line} imports its sibling {other}")
        if other in CONFIGURATION and module not in CONFIGURATION | READ_THE_CONFIGURATION:
            found.append(f"{module}:{line} imports config; it takes plain arguments instead")
        if ours == "kernels" and theirs in OBJECTS_OF_THE_LOSS:
            found.append(f"{module}:{line} imports {other}; kernels take numbers and tensors")
        if ours == "models" and theirs != "models":
            found.append(f"{module}:{line} imports {other}; models know torch only")
    return found


def work_at_import(module: str, source: str) -> list[str]:
    """Statements of a module that do more than define, one line each."""
    return [f"{module}:{node.lineno} {what}" for node, what in _work(ast.parse(source).body, main=module in PROGRAMS)]


def _work(body: list[ast.stmt], main: bool = False) -> Iterator[tuple[ast.stmt, str]]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.Pass):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _work(node.body)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        elif isinstance(node, ast.Expr) and ast.unparse(node.value).startswith("app.add_typer("):
            continue  # a command's commands
        elif isinstance(node, ast.If) and _is_guard(node.test, "TYPE_CHECKING", "sys.version_info", "sys.platform"):
            yield from _work([*node.body, *node.orelse])
        elif isinstance(node, ast.If) and main and _is_guard(node.test, "__name__"):
            continue
        elif isinstance(node, ast.Try) and all(_names(handler.type) == "ImportError" for handler in node.handlers):
            yield from _work([*node.body, *node.orelse, *(inner for h in node.handlers for inner in h.body)])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from ((node, what) for what in _work_of_value(node.value))
        else:
            yield node, f"runs `{ast.unparse(node).splitlines()[0]}` at import"


def _work_of_value(value: ast.expr | None) -> Iterator[str]:
    skipped: set[ast.AST] = set()
    for node in ast.walk(value) if value is not None else []:
        if isinstance(node, ast.Lambda):
            skipped.update(ast.walk(node))
        if node in skipped:
            continue
        if isinstance(node, ast.Call):
            name = _names(node.func).split(".")[-1]
            # A class made here out of constants is a definition, too: `augment: AugmentConfig = AugmentConfig()`.
            if name not in DEFINING_CALLS and not name[:1].isupper():
                yield f"calls {ast.unparse(node.func)} at import"
        if isinstance(node, ast.Attribute) and _names(node) in {"os.environ", "sys.argv"}:
            yield f"reads {_names(node)} at import"


def _is_guard(test: ast.expr, *names: str) -> bool:
    left = test.left if isinstance(test, ast.Compare) else test
    return any(_names(left) == name or _names(left).endswith(f".{name}") for name in names)


def _names(node: ast.AST | None) -> str:
    return ast.unparse(node) if node is not None else ""


@pytest.mark.parametrize("module", list(files()))
def test_imports_go_downwards_and_nothing_runs_at_import(module: str):
    assert module in LAYERS, f"{module} has no place in the tree: give it one in LAYERS of {Path(__file__).name}"
    source = files()[module].read_text()
    assert problems_of(module, source) == []
    assert work_at_import(module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "match"),
    [
        ("margins", "from partial_fc.head import PartialFC", "margins:1 imports head, which lies above it"),
        ("margins", "from partial_fc import PartialFC", "imports partial_fc, which lies above"),
        ("margins", "def f():\n    from . import emphasis", "margins:2 imports emphasis"),
        ("data.table", "from .decode import decode", "imports data.decode"),
        ("data.table", "import partial_fc.data", "imports data, which"),
        ("evaluate.runner", "from partial_fc.metrics import Metrics", "sibling metrics"),
        ("head", "from partial_fc import config", "plain arguments"),
        ("serve", "from partial_fc.config import load_config", "plain arguments"),
        ("kernels.reference", "from partial_fc.margins import CosFace", "numbers and tensors"),
        ("models.small", "import numpy as np", "torch only"),
        ("models.small", "from partial_fc.errors import ConfigError", "torch only"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, match: str):
    assert match in "\n".join(problems_of(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("emphasis", "from partial_fc.errors import ConfigError\nfrom .margins import CosFace"),
        ("kernels", "from partial_fc.kernels import reference"),
        ("data.dali", "from .order import Stream\nimport numpy"),
        ("evaluate.runner", "from partial_fc.data.decode import decode\nfrom .bins import read"),
        ("build", "from partial_fc import PartialFC, data, optim\nfrom partial_fc.config import Config"),
        ("models", "import math\nimport torch\nfrom .small import Small"),
    ],
)
def test_a_right_import_passes(module: str, source: str):
    assert problems_of(module, source) == []


@pytest.mark.parametrize(
    "line",
    [
        "dist.init_process_group()",
        "DEVICES = torch.cuda.device_count()",
        "HOME = os.environ['HOME']",
        "for i in range(3): pass",
        "class A:\n    x = torch.zeros(3)",
        "if torch.cuda.is_available(): pass",
        "if __name__ == '__main__': main()",
    ],
)
def test_work_at_import_is_found(line: str):
    assert len(work_at_import("train", line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        '"""Words."""',
        "logger = logging.getLogger(__name__)",
        "SIZES = {'small': (1, 2)}",
        "app = typer.Typer(help='x')",
        "if TYPE_CHECKING:\n    import x",
        "class A:\n    x: int = Field(3)\n    y = field(default_factory=lambda: make())",
    ],
)
def test_a_definition_passes(line: str):
    assert work_at_import("train", line) == []


def test_the_main_module_may_run():
    assert work_at_import("__main__", "if __name__ == '__main__':\n    main()") == []
