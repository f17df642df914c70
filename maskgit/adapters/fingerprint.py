"""Which version of a codebase a target holds, told by its code; what is read from it, not known.

A function's digest is that of its normalised syntax tree: comments, docstrings, annotations, formatting
and decorators that do not change a result are left out, literals stay.  What an adapter reads from the
target is left out too: the defaults of the functions that it replaces and, where it asks for them, token
ids.  A target is known if every function that is replaced or relied on, and each one of the codebase that
those call by name, has the digest that a known version lists, and each constant that they name its value.
What is digested is the text in the file; the code that runs must be what this Python makes of that text, and
nothing may lie around it but decorators of its own definition and those that change no result.

    python -m maskgit.adapters generate.py generate --helpers add_gumbel_noise

prints the digests of functions in a file.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

Known = Mapping[str, Mapping[str, str]]  # label of a version -> name of a function -> digest

TRUSTED = "not known, trusted"
_HARMLESS = (
    *("torch.no_grad", "torch.inference_mode", "torch.compile"),
    *("staticmethod", "classmethod", "replace_example_docstring"),
)
_COMPILING = (  # where torch.compile's layers are made, and which of a module's functions make them
    ("torch._dynamo.eval_frame", ""),
    ("torch._dynamo.external_utils", "wrap_inline."),
)
_LIBRARIES = {  # what these names must stand for, since their code is not looked at
    "torch": "torch", "F": "torch.nn.functional", "np": "numpy", "math": "math",
    "jax": "jax", "jnp": "jax.numpy", "lax": "jax.lax",
}  # fmt: skip
_LEFT_OUT = ("ctx", "kind", "type_comment", "type_params")
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))
_LEAST_ID, _ID = 1000, "<id>"  # integers from there on are token ids where an adapter reads those


class AdapterError(RuntimeError):
    """The target cannot be patched, or not now; it is as it was."""


class Code(NamedTuple):
    """A function as it is known: its digest, the ids read from it, the names that it looks up."""

    digest: str
    ids: tuple[int, ...]
    names: tuple[str, ...]


def check_version(
    target: Any,
    replaced: tuple[str, ...],
    known: Known,
    *,
    relied: tuple[str, ...] = (),
    what: str,
    trusted: bool = False,
    ids_in: str | None = None,
) -> str:
    """The label of the known version that the target holds.

    Args:
        target: a module, class or object.
        replaced: names of its functions that are replaced; their defaults are the target's.
        known: the digests of each version by the functions' names.
        relied: names of its functions that are relied on.
        what: the codebase, for messages.
        trusted: whether a version that is not known is `TRUSTED`.
        ids_in: the function whose token ids are read.

    Raises:
        AdapterError: an unknown version, or a source that cannot be read, unless trusted.
    """
    try:
        found = digests(target, replaced, relied, ids_in)
        label = next((label for label, wanted in known.items() if wanted == found), None)
        if label is not None:
            return label
        why = _difference(found, known)
    except _Unreadable as error:
        why = str(error)
    if trusted:
        return TRUSTED
    raise AdapterError(
        f"target: an unknown version of {what}; {why}; known: {', '.join(known)}.  "
        "If it decodes as one of those does, trust_version=True leaves this check out"
    )


def digests(
    target: Any, replaced: tuple[str, ...], relied: tuple[str, ...] = (), ids_in: str | None = None
) -> dict[str, str]:
    """The digest of each function by its name, with what they call, and the constants they name."""
    found: dict[str, str] = {}
    seen: dict[str, Any] = {}
    left = [(name, getattr(target, name, None), name in replaced) for name in (*replaced, *relied)]
    home = original_of(left[0][1])
    while left:
        name, value, is_replaced = left.pop(0)
        if name in seen:
            if seen[name] is not value:
                raise _Unreadable(f"{name} means two things in it")
            continue
        seen[name] = value
        if not callable(value):
            found[name] = repr(value)
            continue
        _check_layers(name, value)
        function = original_of(value)
        node = _definition(function, name)
        _check_loaded(function, node.args, name, not is_replaced)
        code = code_of(node, defaults=not is_replaced, ids=name == ids_in)
        found[name] = code.digest
        left += [(n, v, False) for n, v in _named(function, code.names, home)]
    return found


def read_ids(function: Any) -> tuple[int, ...]:
    """The token ids in the code of a function, in the order in which they stand there."""
    try:
        return code_of(_definition(original_of(function), ""), defaults=False, ids=True).ids
    except _Unreadable:
        return ()


def _definition(function: Any, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """A function in Python, as its file has it."""
    try:
        source = inspect.getsource(function)
        tree = ast.parse(f"if True:\n{source}" if source[:1].isspace() else source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise _Unreadable(f"the source of {name} cannot be read ({error})") from error
    node = tree.body[0] if isinstance(tree, ast.If) else tree
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise _Unreadable(f"the source of {name} cannot be read (it is no def)")
    return node


def _check_loaded(function: Any, written: ast.arguments, name: str, defaults: bool) -> None:
    """Refuse a function that runs other code, or has other literal defaults, than its file says now."""
    code = function.__code__
    try:
        made = _compiled("".join(inspect.findsource(function)[0]))
    except (OSError, SyntaxError, ValueError) as error:
        raise _Unreadable(f"the source of {name} cannot be read ({error})") from error
    place = code.co_qualname, code.co_firstlineno
    same = _bare(code) in [_bare(c) for c in made if (c.co_qualname, c.co_firstlineno) == place]
    if same and defaults:
        by_name = function.__kwdefaults__ or {}
        nodes = [*written.defaults, *written.kw_defaults]
        values = [*(function.__defaults__ or ()), *(by_name.get(a.arg) for a in written.kwonlyargs)]
        same = len(nodes) == len(values) and all(
            repr(node.value) == repr(value)
            for node, value in zip(nodes, values, strict=True)
            if isinstance(node, ast.Constant)
        )
    if not same:
        raise _Unreadable(f"{name} as it is loaded is not what its file says")


@lru_cache(maxsize=8)
def _compiled(text: str) -> list[CodeType]:
    """The code of everything that a file defines."""
    found = [compile(text, "", "exec", dont_inherit=True)]
    for code in found:
        found += [value for value in code.co_consts if isinstance(value, CodeType)]
    return found


def _bare(code: CodeType) -> CodeType:
    """The code without its place in a file."""
    consts = (_bare(v) if isinstance(v, CodeType) else v for v in code.co_consts)
    return code.replace(co_filename="", co_firstlineno=1, co_linetable=b"", co_consts=tuple(consts))


def code_of(node: ast.AST, *, defaults: bool = True, ids: bool = False) -> Code:
    """The code of a function definition.

    Args:
        node: the definition; it is changed.
        defaults: whether the values of its defaults count.
        ids: whether token ids are read, and do not count.
    """
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    node.name = ""
    if not defaults:
        node.args.defaults = [ast.Constant(...) for _ in node.args.defaults]
        node.args.kw_defaults = [d and ast.Constant(...) for d in node.args.kw_defaults]
    plain = _Plain(ids)
    text = "".join(_written(plain.visit(node)))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Code(digest, tuple(plain.ids), tuple(_looked_up(node)))


class _Unreadable(Exception):
    """The code of a function is not to be had."""


class _Plain(ast.NodeTransformer):
    """Leaves out what does not change a result."""

    def __init__(self, reads_ids: bool):
        self.reads_ids, self.ids = reads_ids, list[int]()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = [d for d in node.decorator_list if _dotted(d) not in _HARMLESS]
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return self.generic_visit(ast.Assign(targets=[node.target], value=node.value))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.generic_visit(node)  # Python 3.12 ends a format with an empty text
        node.values = [v for v in node.values if getattr(v, "value", None) != ""]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if not self.reads_ids or type(value) is not int or value < _LEAST_ID:
            return node
        self.ids.append(value)
        return ast.Name(id=_ID, ctx=ast.Load())


def _written(value: Any) -> Iterator[str]:
    """A tree in words that are the same under every version of Python."""
    if isinstance(value, ast.Constant):
        yield f"{type(value.value).__name__} {value.value!r};"
    elif isinstance(value, ast.AST):
        yield f"{type(value).__name__}("
        for name, field in ast.iter_fields(value):
            if name not in _LEFT_OUT and field is not None and field != []:
                yield f"{name}="
                yield from _written(field)
        yield ")"
    elif isinstance(value, list):
        yield "["
        for item in value:
            yield from _written(item)
        yield "]"
    else:
        yield f"{value!r};"


def _dotted(node: ast.AST) -> str:
    """a.b.c of such a node, or of a call of it; else nothing."""
    if isinstance(node, ast.Call):
        return _dotted(node.func)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _looked_up(tree: ast.AST) -> Iterator[str]:
    """The names, and attributes of names, that a function uses and does not set itself."""
    nodes = list(ast.walk(tree))
    own = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    own |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for node in nodes:
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = _dotted(node)
            if name.partition(".")[0] not in {*own, _ID, ""}:
                yield name


def _named(function: FunctionType, names: tuple[str, ...], home: Any) -> Iterator[tuple[str, Any]]:
    """What the names stand for: functions of the codebase, and constants of its modules."""
    if function.__builtins__ is not vars(builtins):  # type: ignore[attr-defined]
        raise _Unreadable(f"{function.__name__} has other builtins than Python's")
    for name in names:
        first, *rest = name.split(".")
        value: Any = function.__globals__.get(first, _named)
        _check_library(first, value)
        for attribute in rest:
            is_module = isinstance(value, ModuleType) and _is_beside(value.__name__, value, home)
            value = getattr(value, attribute, _named) if is_module else _named
        if value is _named:
            continue
        if _is_constant(value):
            yield name, value
        elif callable(value) and not isinstance(value, type):
            inner = original_of(value)
            if isinstance(inner, FunctionType) and _is_beside(inner.__module__, inner, home):
                yield name, value


def _check_library(name: str, value: Any) -> None:
    """Refuse something else under the usual name of a library, or of one of Python's functions."""
    wanted = _LIBRARIES.get(name)
    if value is not _named and value is not getattr(builtins, name, value):
        raise _Unreadable(f"{name} stands for {value!r} in it, not for Python's own")
    if wanted is None or value is _named:
        return
    got = value.__name__ if isinstance(value, ModuleType) else repr(value)
    if got != wanted:
        raise _Unreadable(f"{name} stands for {got} in it, not for {wanted}")


def _is_constant(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_constant(item) for pair in value.items() for item in pair)
    if isinstance(value, (tuple, list)):
        return all(_is_constant(item) for item in value)
    return isinstance(value, _CONSTANTS)


def _is_beside(module: str, value: Any, home: Any) -> bool:
    """Whether a module, or a function's module, is of the package or directory of `home`."""
    if module.partition(".")[0] == home.__module__.partition(".")[0]:
        return True
    return _directory(value) == _directory(home) != ""


def _directory(value: Any) -> str:
    try:
        return os.path.dirname(os.path.abspath(inspect.getsourcefile(value) or ""))
    except TypeError:
        return ""


def _difference(found: Mapping[str, str], known: Known) -> str:
    """Where the digests part from the nearest known version's."""
    label = max(known, key=lambda label: len(found.items() & known[label].items()))
    wanted, parts = known[label], []
    for name in dict.fromkeys((*wanted, *found)):
        if found.get(name) != wanted.get(name):
            expected, got = wanted.get(name, "none"), found.get(name, "none")
            parts.append(f"{name}: expected {expected} ({label}), got {got}")
    return ", ".join(parts)


def original_of(function: Any) -> Any:
    """The function inside decorators, also one that leaves no trace but its closure."""
    inner = _inside(function)
    return function if inner is None else original_of(inner)


def _inside(function: Any) -> Any:
    """What a method or a decorated function holds, else None."""
    inner = getattr(function, "__func__", getattr(function, "__wrapped__", None))
    if inner is None and isinstance(function, FunctionType) and function.__closure__:
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
            inside = [cell.cell_contents for cell in function.__closure__]
            functions = [value for value in inside if isinstance(value, FunctionType)]
            inner = functions[0] if len(functions) == 1 else None
    return inner


def _check_layers(name: str, function: Any) -> None:
    """Refuse a decorator whose work would be lost."""
    original, inner = original_of(function), _inside(function)
    while inner is not None:
        if not _is_harmless(function, inner):
            where = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
            code = getattr(function, "__code__", None)
            made_by = code.co_qualname if code else type(function).__name__
            if not _holds(function, inner) or not _is_beside(where, function, original):
                raise _Unreadable(f"{name} is wrapped by {made_by} of {where}")
            made_by = made_by.partition(".")[0]
            if made_by not in _decorators(original):  # those of its definition are digested with it
                raise _Unreadable(
                    f"{name} is wrapped by {made_by}, which its definition does not name"
                )
        function, inner = inner, _inside(inner)


def _is_harmless(layer: Any, inner: Any) -> bool:
    """Whether a layer is a method, no_grad, inference_mode, compile, jit or a check of types."""
    if inspect.ismethod(layer) or type(layer) in (staticmethod, classmethod):
        return True
    if not isinstance(layer, FunctionType):
        jax = sys.modules.get("jax")
        return jax is not None and type(layer) is type(jax.jit(_directory))
    if not _holds(layer, inner):
        return False
    for module, maker in _COMPILING:
        is_its = layer.__globals__ is getattr(sys.modules.get(module), "__dict__", None)
        if is_its and layer.__code__.co_qualname.startswith(maker):
            return True
    torch = sys.modules.get("torch")
    if torch is not None and layer.__code__ is torch.no_grad()(_directory).__code__:
        modes = (torch.no_grad, torch.inference_mode)
        return any(type(getattr(held, "__self__", None)) in modes for held in _held(layer))
    return layer.__code__.co_filename.startswith("<@beartype(")


def _holds(layer: Any, inner: Any) -> bool:
    """Whether a function calls what it says that it wraps."""
    return any(held is inner for held in _held(layer))


def _held(layer: Any) -> list[Any]:
    cells = getattr(layer, "__closure__", None) or ()
    return [
        *(c.cell_contents for c in cells),
        *(getattr(layer, "__kwdefaults__", None) or {}).values(),
    ]


def _decorators(function: Any) -> set[str]:
    """The names of the decorators in a function's source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return set()
    return {_dotted(d).rpartition(".")[2] for d in getattr(tree, "decorator_list", [])}


def signature_of(function: Any) -> inspect.Signature:
    """The signature to call a function or bound method by, decorators seen through."""
    signature = inspect.signature(original_of(function))
    if not inspect.ismethod(function):
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def with_their_defaults(original: Any, ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours`, called by name, with the defaults that `original` has for what a caller leaves out.

    Keywords that `original` does not have are handed on as they are.
    """
    signature = signature_of(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        theirs = {name: kwargs.pop(name) for name in signature.parameters if name in kwargs}
        bound = signature.bind(*args, **theirs)
        bound.apply_defaults()
        return ours(**bound.arguments, **kwargs)

    return call


def check_signature(function: Any, expected: str, what: str) -> None:
    """AdapterError unless the parameters of `function` are `expected`, names joined by ", "."""
    try:
        got = ", ".join(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"target: {what} has no readable signature") from error
    if got != expected:
        raise AdapterError(
            f"target: an unknown version of {what}; expected parameters ({expected}), got ({got})"
        )


def check_attributes(target: Any, names: tuple[str, ...], what: str) -> None:
    """AdapterError unless the target has these attributes."""
    missing = [name for name in names if not hasattr(target, name)]
    if missing:
        raise AdapterError(
            f"target: an unknown version of {what}; expected attributes {', '.join(names)}, "
            f"without {', '.join(missing)}"
        )


def names_in(function: Any) -> frozenset[str]:
    """What the code of a Python function refers to and calls its variables, its parameters apart."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return frozenset()
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return frozenset((*code.co_names, *code.co_varnames, *code.co_cellvars)) - set(parameters)
