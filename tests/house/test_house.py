"""Which module imports which, read from the source: no circles, and no arrow from below to above."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {"maskgit": "maskgit", "kernels": "maskgit.kernels", "benchmarks": "maskgit.benchmarks"}

# what may not import what, at the top or in a function
BELOW = ("maskgit.sampling", "maskgit.layouts", "maskgit.audit")
ABOVE = ("maskgit.cli", "maskgit.pipelines", "maskgit.training", "maskgit.adapters")

# of an op: files or folders of which none imports another
IMPLEMENTATIONS = (
    "reference", "plain", "torch_ref", "jax_ref", "cpu", "triton_cuda", "pallas_tpu",
)  # fmt: skip
# The fused heads end in the races and scores of the decode step's own rows: the same functions of the same
# language, inside one kernel, so that no call through a dispatch could stand between them.
WITHIN_ONE_KERNEL = {
    ("head_sample.triton_cuda", "decode_step.triton_cuda"),
    ("head_sample.pallas_tpu", "decode_step.pallas_tpu"),
}


def modules():
    """Name -> (path, whether it is a package) of every module as it is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            inner = parts[:-1] if is_package else parts
            found[".".join((package, *inner))] = (path, is_package)
    return found


MODULES = modules()


def statements(tree, inside=False):
    """(import statement, whether it runs only when a function is called); none for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (found for part in node.orelse for found in statements(part, inside))
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(node, inside or is_function)


def named(node, module, is_package):
    """The modules that a statement asks for: of `from a import b` a.b where that is one, else a."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    base = node.module or ""
    if node.level:
        above = module.split(".")[: len(module.split(".")) - node.level + is_package]
        base = ".".join((*above, base)) if base else ".".join(above)
    inner = {f"{base}.{alias.name}" for alias in node.names}
    known = {name for name in inner if name in MODULES or name == "maskgit._C"}
    return known | ({base} if len(known) < len(inner) else set())


def imports():
    """(at import time, in functions): module -> modules of this project that it imports."""
    direct = {name: set() for name in MODULES}
    lazy = {name: set() for name in MODULES}
    for name, (path, is_package) in MODULES.items():
        for node, inside in statements(ast.parse(path.read_text())):
            ours = {m for m in named(node, name, is_package) if m.split(".")[0] == "maskgit"}
            (lazy if inside else direct)[name] |= ours - {name}
    return direct, lazy


DIRECT, LAZY = imports()


def circles(graph):
    """Strongly connected sets of at least two modules."""
    reached = {name: set() for name in graph}
    for name in graph:
        todo = [name]
        while todo:
            for other in graph.get(todo.pop(), ()):
                if other not in reached[name]:
                    reached[name].add(other)
                    todo.append(other)
    found = {frozenset({a, *(b for b in reached[a] if a in reached.get(b, ()))}) for a in graph}
    return {circle for circle in found if len(circle) > 1}


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_the_modules_and_their_imports_were_found():
    assert len(MODULES) > 100
    assert "maskgit.sampling.steps" in DIRECT["maskgit.sampling.loop"]
    assert "maskgit.sampling.graphs" in LAZY["maskgit.sampling.loop"]
    assert "maskgit.kernels.decode_step" in DIRECT["maskgit.sampling.loop"]


def test_no_circle_at_import_time():
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == {frozenset({"a", "b"})}
    assert not circles(DIRECT)


def test_imports_in_functions_close_no_circle():
    assert not circles({name: DIRECT[name] | LAZY[name] for name in MODULES})


def test_arrows_go_one_way():
    for name in MODULES:
        for other in DIRECT[name] | LAZY[name]:
            arrow = f"{name} imports {other}"
            if within(name, BELOW):
                assert not within(other, ABOVE), arrow
            if within(name, ("maskgit.kernels",)):
                assert within(other, ("maskgit.kernels", "maskgit._C")), arrow
            if within(other, ("maskgit.benchmarks",)):
                assert within(name, ("maskgit.benchmarks", "maskgit.cli")), arrow
            if within(name, ("maskgit.training",)):
                assert not within(other, ("maskgit.pipelines", "maskgit.cli")), arrow
            if within(name, ("maskgit.models",)):
                assert not within(other, (*BELOW, *ABOVE)), arrow


def op_and_implementation(name):
    """("decode_step", "cpu") of a module of kernels; None for no op, and for no implementation of it."""
    parts = name.removeprefix("maskgit.kernels.").split(".")
    if not within(name, ("maskgit.kernels",)) or parts[0] in ("common", "maskgit"):
        return None, None
    return parts[0], parts[1] if len(parts) > 1 and parts[1] in IMPLEMENTATIONS else None


def test_an_implementation_never_imports_another():
    found = set()
    for name in MODULES:
        op, own = op_and_implementation(name)
        for other in DIRECT[name] | LAZY[name]:
            arrow = f"{name} imports {other}"
            other_op, theirs = op_and_implementation(other)
            if within(name, ("maskgit.kernels.common",)):
                assert other_op is None, arrow
            if op is None or theirs is None or (op, own) == (other_op, theirs):
                continue
            if op == other_op:
                assert own is None, arrow
            else:
                found.add((f"{op}.{own}", f"{other_op}.{theirs}"))
    assert found == WITHIN_ONE_KERNEL


def test_the_decode_step_names_its_implementations_once():
    """In the table of dispatch.py: nothing else of the op knows one."""
    for name in MODULES:
        if op_and_implementation(name) == ("decode_step", None):
            for other in DIRECT[name] | LAZY[name]:
                assert op_and_implementation(other)[1] is None, f"{name} imports {other}"
