"""What holds for every adapter: versions told by code, the target's own defaults, its backend's name."""

import ast
import functools
import inspect
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_adapter_dinfer as dinfer_test
import test_adapter_dream as dream_test
import test_adapter_maskbit as maskbit_test
import test_adapter_maskgit_jax as jax_test
import test_adapter_mdlm as mdlm_test
import test_adapter_muse as muse_test
import test_adapter_remdm as remdm_test
import test_adapter_titok as titok_test
from helpers import on_toy, patch_toy

from maskgit import adapters

torch = pytest.importorskip("torch")
from maskgit.adapters import (  # noqa: E402
    AdapterError,
    dinfer,
    dream,
    fast_dllm,
    fingerprint,
    llada,
    maskbit,
    maskgit_jax,
    mdlm,
    muse,
    remdm,
    titok,
)
from maskgit.adapters.__main__ import main  # noqa: E402
from maskgit.adapters.registry import module_of  # noqa: E402

LLADA = '''
import torch

BIAS = [0.0, {"more": 0}]


def add_gumbel_noise(logits, temperature):
    """Noise."""
    return logits + temperature


def get_num_transfer_tokens(mask_index, steps):
    return mask_index.sum() // steps


def generate(model, prompt, attention_mask=None, steps=4, gen_length=8, block_length=8, temperature=0.0,
             cfg_scale=0.0, remasking="low_confidence", mask_id=59, logits_eos_inf=False,
             confidence_eos_eot_inf=False):
    """Text."""
    logits = add_gumbel_noise(model(prompt), temperature)
    logits[7001] = logits[7001] - 1 + BIAS[0]
    logits[7002] = get_num_transfer_tokens(prompt, steps) * 2  # half
    return logits
'''
FAST_DLLM = """
def get_num_transfer_tokens(mask_index, steps):
    return mask_index.sum() // steps


def generate_with_dual_cache():
    return None


def get_transfer_index(logits, temperature, remasking, mask_index, x, num_transfer_tokens, threshold=None):
    return logits + temperature


def get_transfer_index_dynamic(logits, temperature, remasking, mask_index, x, num_transfer_tokens, factor=1):
    return logits + factor
"""


def module(source, folder, name="generate"):
    """A module of this source, which lies in a file, so that its code can be read."""
    path = folder / f"{name}.py"
    path.write_text(source)
    out = types.ModuleType(name)
    out.__file__ = str(path)
    exec(compile(source, path, "exec"), out.__dict__)
    return out


@dataclass
class Case:
    """An adapter, a target of its kind, and which function of ours takes the place of which of theirs."""

    adapter: Any
    target: Any
    replaced: dict[str, Any]  # name of theirs -> (where ours is, its name, their parameters)


def case(name, folder):
    if name.startswith("dinfer"):
        target = getattr(dinfer_test, name.removeprefix("dinfer "))()
        return Case(dinfer, target, {"decode": (dinfer, "decode", dinfer._ARGUMENTS)})
    updates = {
        "_ddpm_update": (mdlm, "ddpm_update", "self, x, t, dt"),
        "_ddpm_caching_update": (mdlm, "ddpm_caching_update", "self, x, t, dt, p_x0"),
    }
    fast = {
        fast_dllm._FIXED: (fast_dllm, fast_dllm._FIXED, f"{fast_dllm._ARGUMENTS}, threshold"),
        fast_dllm._DYNAMIC: (fast_dllm, fast_dllm._DYNAMIC, f"{fast_dllm._ARGUMENTS}, factor"),
    }
    again = {
        "_ddpm_caching_update": (remdm, "ddpm_caching_update", f"self, {remdm._UPDATE}"),
        "_dfm_caching_update": (remdm, "dfm_caching_update", "self, x, t, p_x0"),
    }
    return {
        "llada": lambda: Case(
            llada, module(LLADA, folder), {"generate": (llada, "generate", llada._NEW)}
        ),
        "llada old": lambda: Case(
            llada, module(LLADA, folder), {"generate": (llada, "generate", llada._OLD)}
        ),
        "fast_dllm": lambda: Case(fast_dllm, module(FAST_DLLM, folder), fast),
        "dream": lambda: Case(
            dream, dream_test.Stub(), {"_sample": (dream, "sample", dream._ARGUMENTS)}
        ),
        "titok": lambda: Case(
            titok,
            titok_test.Stub(),
            {"generate": (titok, "generate", f"self, {titok._ARGUMENTS}")},
        ),
        "maskbit": lambda: Case(
            maskbit, maskbit_test.module(), {"sample": (maskbit, "sample", maskbit._ARGUMENTS)}
        ),
        "maskgit_jax": lambda: Case(
            maskgit_jax,
            jax_test.module(),
            {"decode": (maskgit_jax, "decode", maskgit_jax._ARGUMENTS)},
        ),
        "muse": lambda: Case(
            muse, muse_test.MaskGit("self"), {"generate": (muse, "generate", muse._ARGUMENTS)}
        ),
        "mdlm": lambda: Case(mdlm, mdlm_test.Diffusion(), updates),
        "remdm": lambda: Case(remdm, remdm_test.Remasking(), updates | again),
    }[name]()


DINFER = [f"dinfer {kind}" for kind in dinfer._KINDS]
NAMES = [
    *("llada", "fast_dllm", "dream", "titok", "maskbit", "maskgit_jax", "muse", "mdlm", "remdm"),
    *DINFER,
]


def owner(target):
    """Where the functions of a target stand."""
    return target if isinstance(target, (types.ModuleType, type)) else type(target)


class Learned:
    """Takes the code that every check meets at first as that of a known version."""

    def __init__(self, monkeypatch, test_case):
        self.met, self.known = [], {}
        where = mdlm if test_case.adapter is remdm else test_case.adapter
        monkeypatch.setattr(where, "check_version", self.check)
        adapters.patch(test_case.target).undo()
        self.is_learning = False

    is_learning = True

    def check(self, target, replaced, known, **options):
        relied = options.get("relied", ())
        key = (owner(target), replaced, relied)
        if self.is_learning:
            self.met.append((target, replaced, relied))
            self.known[key] = fingerprint.digests(target, replaced, relied, options.get("ids_in"))
        return fingerprint.check_version(target, replaced, {"toy": self.known[key]}, **options)


def changed(function, folder, number):
    """A function with the same parameters whose code has one statement more."""
    function = fingerprint.original_of(function)
    source = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(source).body[0]
    tree.decorator_list = []
    tree.body.insert(0, ast.parse("unheard_of = 1 + 2").body[0])
    name = f"{tree.name}_{number}"
    namespace = dict(function.__globals__)
    path = folder / f"{name}.py"
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    exec(compile(path.read_text(), path, "exec"), namespace)
    out = namespace[tree.name]
    out.__module__ = function.__module__
    return out


@pytest.mark.parametrize("name", NAMES)
def test_other_code_is_refused_in_every_function_and_left_alone(name, monkeypatch, tmp_path):
    """Whatever an adapter replaces or relies on: with other code in its body it is another version."""
    test_case = case(name, tmp_path)
    target = test_case.target
    with pytest.raises(AdapterError, match=r"unknown version of .*trust_version=True"):
        adapters.patch(target)
    learned = Learned(monkeypatch, test_case)
    with adapters.fast_sampler(target) as handle:
        assert "toy" in handle.report.version
    replaced = [name for _, names, _ in learned.met for name in names]
    assert set(test_case.replaced) <= set(replaced)
    functions = [(t, n) for t, names, relied in learned.met for n in (*names, *relied)]
    for number, (holder, function) in enumerate(functions):
        at = owner(holder)
        with monkeypatch.context() as patches:
            patches.setattr(at, function, changed(getattr(at, function), tmp_path, number))
            before = dict(vars(target))
            with pytest.raises(
                AdapterError, match=rf"unknown version of .*{function}: expected \w+ \(toy\), got"
            ):
                adapters.patch(target)
            assert vars(target) == before
            with on_toy(target) as handle:
                assert "not known, trusted" in handle.report.version
    with adapters.fast_sampler(target) as handle:
        assert "toy" in handle.report.version


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("logits + temperature", "logits - temperature", "add_gumbel_noise: expected"),
        ("sum() // steps", "max() // steps", "get_num_transfer_tokens: expected"),
        ("- 1 + BIAS[0]", "- 2 + BIAS[0]", "generate: expected"),
        ("* 2  # half", "* 2.0", "generate: expected"),
        (
            '"more": 0',
            '"more": 1',
            "BIAS: expected [0.0, {'more': 0}] (toy), got [0.0, {'more': 1}]",
        ),
        ("    return logits\n", "    return -logits\n", "generate: expected"),
        ("# half", "# a comment", None),
        ('"""Noise."""', '"""Other\n    words."""', None),
        ("logits + temperature", "(logits\n        + temperature)", None),
        ("(logits, temperature)", "(logits: object, temperature: float) -> object", None),
        ("    logits = add", "    logits: object = add", None),
        ("mask_id=59", "mask_id=3", None),  # read from the target
        ("7001", "8001", None),
        ("steps=4", "stages=4", "generate; expected parameters"),
        ("\ndef generate", "\n@torch.no_grad()\ndef generate", None),
    ],
)
def test_what_makes_a_version(before, after, what, monkeypatch, tmp_path):
    known = fingerprint.digests(module(LLADA, tmp_path), ("generate",), ids_in="generate")
    assert list(known) == ["generate", "add_gumbel_noise", "BIAS", "get_num_transfer_tokens"]
    monkeypatch.setattr(llada, "VERSIONS", {"toy": known})
    monkeypatch.setattr(llada, "END_TOKENS", (1, 2, 3))
    assert before in LLADA
    target = module(LLADA.replace(before, after), tmp_path, "other")
    if what is None:
        assert adapters.patch(target).report.version == "toy"
        return
    stays = dict(vars(target))
    with pytest.raises(AdapterError) as error:
        adapters.patch(target)
    assert what in str(error.value)
    assert vars(target) == stays


def test_the_digest_is_the_one_that_the_lists_were_made_with():
    """It may not change with this code, nor with Python's version."""
    source = """
    @torch.no_grad()
    @other
    def decode(self, x: int, *rest, mask_id=126336, key=None) -> int:
        'Text.'
        y: float = x[..., 1:2] if x else -1.5
        unused: int
        for i, (a, b) in enumerate(rest):
            y += [f"{a!r}{b:>{i}}", lambda *z, w=2: (z, w)][126081]
        return {**key, "a": {1, 2}} and y
    """
    node = ast.parse(textwrap.dedent(source)).body[0]
    code = fingerprint.code_of(node, defaults=False, ids=True)
    assert code == ("f6637ad6733b9362", (126081,), ("other", "enumerate"))


def test_code_that_cannot_be_read_is_refused_unless_trusted(tmp_path):
    target = types.ModuleType("generate")
    exec(LLADA, target.__dict__)
    with pytest.raises(AdapterError, match="the source of generate cannot be read"):
        adapters.patch(target)
    assert patch_toy(target).report.version == "not known, trusted"
    target = module(LLADA, tmp_path)
    target.add_gumbel_noise = lambda logits, temperature: logits  # of another file than theirs
    with pytest.raises(AdapterError, match=r"add_gumbel_noise: expected \w+ \(.*\), got none"):
        adapters.patch(target)
    target = module(f"{LLADA}\nadd_gumbel_noise = lambda x, temperature: x\n", tmp_path)
    with pytest.raises(AdapterError, match="the source of add_gumbel_noise cannot be read"):
        adapters.patch(target)
    with pytest.raises(AdapterError, match="trust_version: expected True or False, got 1"):
        adapters.patch(target, trust_version=1)


def test_a_wrapper_of_somebody_else_is_refused(monkeypatch, tmp_path):
    """What it does would be lost; torch's own decorators, and those in the code, are known."""
    target = module(LLADA.replace("def generate", "@torch.no_grad()\ndef generate"), tmp_path)
    known = fingerprint.digests(target, ("generate",), ids_in="generate")
    monkeypatch.setattr(llada, "VERSIONS", {"toy": known})
    adapters.patch(target).undo()
    theirs = target.generate

    def louder(*args, **kwargs):
        return theirs(*args, **kwargs) + 1

    target.generate = louder
    with pytest.raises(AdapterError, match="unknown version of LLaDA's generate; expected"):
        adapters.patch(target)
    target.generate = functools.wraps(theirs)(louder)
    with pytest.raises(AdapterError, match=rf"generate is wrapped by \S+louder of {__name__}"):
        adapters.patch(target)
    patch_toy(target).undo()


AROUND = """
import functools
def flipped(f):
    @functools.wraps(f)
    def inner(*args, **kwargs):
        return -f(*args, **kwargs)
    return inner
"""
OTHERS = {
    "wrapped in its own module": f"{AROUND}generate = flipped(generate)",
    "a helper wrapped": f"{AROUND}add_gumbel_noise = flipped(add_gumbel_noise)",
    "a class for F": "class Other:\n    softmax = staticmethod(min)\nF = Other",
    "another module for F": "import math as F",
    "another module for torch": "import math as torch",
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_stands_around_the_code_counts_too(what, monkeypatch, tmp_path):
    (tmp_path / "a").mkdir()
    code = LLADA.replace("logits + temperature", "F.relu(logits) + torch.tensor(temperature)")
    plain = "import torch.nn.functional as F\n" + code
    known = fingerprint.digests(module(plain, tmp_path / "a"), ("generate",), ids_in="generate")
    monkeypatch.setattr(llada, "VERSIONS", {"toy": known})
    code = f"{plain}\n{OTHERS[what]}\n"
    (tmp_path / "b").mkdir()
    with pytest.raises(AdapterError, match=r"is wrapped by flipped|stands for .* in it"):
        adapters.patch(module(code, tmp_path / "b"))


LAYERS = {  # what is put around a function afterwards, and who is named where that is refused
    "torch.no_grad()": None,
    "torch.no_grad": None,
    "torch.inference_mode()": None,
    "torch.compile": None,
    "torch.compiler.disable": None,
    "torch.enable_grad()": "context_decorator",
    "torch.autocast('cpu', dtype=torch.bfloat16)": "autocast_decorator",
    "torch.random.fork_rng()": "ContextDecorator",
    "torch.profiler.record_function('x')": "ContextDecorator",
    "torch.overrides.wrap_torch_function(lambda *a, **k: a)": "wrap_torch_function",
    # whose own function is another than what it says that it wraps
    "lambda f: functools.wraps(f)(torch.no_grad()(lambda *a, **k: -f(*a, **k)))": "context_decorator",
    "lambda f: functools.wraps(f)(torch.compile(lambda *a, **k: -f(*a, **k)))": "_TorchDynamoContext",
}


@pytest.mark.parametrize("name", ["generate", "add_gumbel_noise"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_trusted_for_what_it_is_not_for_whose_it_is(layer, name, monkeypatch, tmp_path):
    known = fingerprint.digests(module(LLADA, tmp_path), ("generate",), ids_in="generate")
    monkeypatch.setattr(llada, "VERSIONS", {"toy": known})
    code = f"{LLADA}\nimport functools\n{name} = ({layer})({name})\n"
    target = module(code, tmp_path, "other")
    if LAYERS[layer] is None:
        assert adapters.patch(target).report.version == "toy"
        return
    with pytest.raises(AdapterError, match=rf"{name} is wrapped by {LAYERS[layer]}\S* of \w+"):
        adapters.patch(target)


LOADED = {  # what runs is not what the file says
    "a line": ("logits + temperature", "logits - temperature"),
    "a constant": ("- 1 + BIAS[0]", "- 2 + BIAS[0]"),
    "a constant's type": ("* 2  # half", "* 2.0  # half"),
    "a name": ("return logits\n", "return prompt\n"),
    "a helper's default": ("(logits, temperature)", "(logits, temperature=1)"),
}


@pytest.mark.parametrize("what", LOADED)
def test_the_code_that_is_loaded_counts_not_its_file_alone(what, monkeypatch, tmp_path):
    """A file that was changed for the import and put back, or a function changed in place."""
    source = LLADA.replace("(logits, temperature)", "(logits, temperature=0)", 1)
    assert source.count(LOADED[what][0]) >= 1 or what == "a helper's default"
    known = fingerprint.digests(module(source, tmp_path), ("generate",), ids_in="generate")
    monkeypatch.setattr(llada, "VERSIONS", {"toy": known})
    before, after = LOADED[what]
    before = before.replace("temperature)", "temperature=0)") if "default" in what else before
    target = module(source.replace(before, after), tmp_path, "other")
    Path(target.__file__).write_text(source)
    with pytest.raises(AdapterError, match="as it is loaded is not what its file says"):
        adapters.patch(target)
    Path(target.__file__).write_text("\n\n" + source)  # the same code in another place is no proof
    with pytest.raises(AdapterError, match=r"is not what its file says|cannot be read"):
        adapters.patch(target)
    target = module(source, tmp_path, "again")
    adapters.patch(target).undo()
    target.add_gumbel_noise.__defaults__ = (True,)
    with pytest.raises(AdapterError, match="add_gumbel_noise as it is loaded"):
        adapters.patch(target)


@pytest.mark.parametrize(
    "shadow",
    [
        "class range: pass",
        "from random import randint as range",
        "import math as range",
        "range = staticmethod(len)",
        "range = 7",
        "def range(n): return [n]",
        "__builtins__ = {**vars(__import__('builtins')), 'range': list}",
    ],
)
def test_what_has_the_name_of_a_builtin_must_be_it(shadow, monkeypatch, tmp_path):
    source = LLADA.replace("logits + temperature", "logits + temperature + sum(range(3))")
    known = fingerprint.digests(module(source, tmp_path), ("generate",), ids_in="generate")
    monkeypatch.setattr(llada, "VERSIONS", {"toy": known})
    adapters.patch(module(f"class filter: pass\n{source}", tmp_path, "unused")).undo()
    target = module(f"{shadow}\n{source}", tmp_path, "other")
    with pytest.raises(AdapterError, match=r"range stands for .* in it|other builtins"):
        adapters.patch(target)


class Value:
    """A default that nothing else is."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"their {self.name}"


def fake(name, parameters):
    """A function of these parameters, of which each has a default of its own."""
    names = [p for p in parameters.split(", ") if p != "self"]
    given = ", ".join((["self"] if "self" in parameters else []) + [f"{p}=V['{p}']" for p in names])
    values = {p: Value(p) for p in names}
    namespace = {"V": values, "DreamModelOutput": None}
    exec(f"def {name}({given}): raise RuntimeError('theirs')", namespace)
    return namespace[name], values


@pytest.mark.parametrize("name", [*NAMES, "llada old"])
def test_what_a_caller_leaves_out_has_the_default_of_the_target(name, monkeypatch, tmp_path):
    """Every default of theirs is another than ours; calls mean what they mean spelt out."""
    test_case = case(name, tmp_path)
    target, at, seen, theirs = test_case.target, owner(test_case.target), [], {}

    def ours(*args, **kwargs):
        seen.append(kwargs)
        return ()

    for function, (where, our_name, parameters) in test_case.replaced.items():
        made, theirs[function] = fake(function, parameters)
        monkeypatch.setattr(at, function, made)
        names = inspect.signature(getattr(where, our_name)).parameters
        assert set(theirs[function]) <= set(names)
        monkeypatch.setattr(where, our_name, ours)
    with on_toy(target):
        for function, values in theirs.items():
            call = getattr(target, function)
            call()
            assert {k: v for k, v in seen[-1].items() if k in values} == values
            call(**values)
            assert seen[-1].keys() == seen[-2].keys()
            assert all(seen[-1][k] is seen[-2][k] for k in values)
            call(*list(values.values())[:2], seeds=None)
            assert {k: v for k, v in seen[-1].items() if k in values} == values
            assert seen[-1]["seeds"] is None
            with pytest.raises(TypeError, match="multiple values"):
                call(1, **values)
            assert inspect.signature(call) == inspect.signature(call._original)


def test_a_copy_of_lladas_file_decodes_with_its_own_mask_and_end_tokens(tmp_path):
    class Model:
        device = torch.device("cpu")

        def __call__(self, tokens, attention_mask=None):
            logits = torch.zeros(*tokens.shape, 64)
            logits[..., 17], logits[..., 21], logits[..., 5] = 9.0, 8.0, 7.0
            return types.SimpleNamespace(logits=logits)

    source = LLADA.replace("logits[7001]", "logits[9017]")
    source = source.replace("7002", "9021").replace("mask_id=59", "mask_id=60")
    target, prompt = module(source, tmp_path), torch.tensor([[1, 59, 2]])
    with on_toy(target) as handle:
        out = target.generate(Model(), prompt)
        same = target.generate(Model(), prompt, mask_id=60, steps=4, gen_length=8, block_length=8)
    assert torch.equal(out, same)
    assert out.shape == (1, 11)
    assert (out[:, :3] == prompt).all()  # 59, the mask of others, is a word here
    assert (out[:, 3:] == 17).all()
    assert handle.report.calls == 2
    assert llada.read_ids(target.generate) == (9017, 9017, 9021)


def test_end_tokens_are_read_from_the_code_of_the_target(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(llada, "generate", lambda **given: seen.append(given["end_tokens"]))
    target = module(LLADA, tmp_path)
    with on_toy(target):
        target.generate(None, None)
    none = module(LLADA.replace("7001", "1").replace("7002", "2"), tmp_path, "none")
    with on_toy(none):
        none.generate(None, None)
    assert seen == [(7001, 7001, 7002), llada.END_TOKENS]
    more = module(LLADA.replace("* 2", "* 7003"), tmp_path, "more")
    with pytest.raises(AdapterError, match="expected three ids of end tokens"):
        patch_toy(more)


@pytest.mark.parametrize("backend", ["cuda9", None, 3])
@pytest.mark.parametrize("adapter", adapters.supported())
def test_a_backend_that_there_is_not_is_refused_by_every_adapter(adapter, backend):
    """Also for an object that is no target of its: names come first."""
    target = types.SimpleNamespace()
    with pytest.raises(ValueError, match="backend: expected auto, "):
        adapters.patch(target, adapter, backend=backend)
    assert not vars(target)


def test_a_backend_is_checked_without_starting_a_framework():
    code = (
        "import sys, types; from maskgit import adapters\n"
        "for backend in ('auto', 'torch', 'cuda9'):\n"
        "    try: adapters.patch(types.SimpleNamespace(), 'titok', backend=backend)\n"
        "    except (ValueError, RuntimeError): pass\n"
        "print(sorted({'torch', 'jax', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"


def test_every_adapter_is_here_and_has_the_option():
    here = {name.split()[0] for name in NAMES} | {"diffusers_schedulers"}  # in a file of its own
    assert here == set(adapters.supported())
    for name in here:
        module_ = module_of(name)
        assert "trust_version" in inspect.signature(module_.install).parameters


def test_the_page_has_a_row_for_every_adapter():
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(adapters.supported())
    versions = {"dinfer": ["fce4e328"], "diffusers_schedulers": ["0.39"]}
    for row in rows:
        name = row.split("`")[1]
        module_ = module_of(name)
        labels = versions.get(name) or [label.split()[0] for label in module_.VERSIONS]
        assert name == "dream" or all(label in row for label in labels)


def test_digests_of_a_file_are_those_of_what_it_defines(tmp_path, capsys):
    target = module(LLADA, tmp_path)
    names = ["add_gumbel_noise", "get_num_transfer_tokens"]
    main([target.__file__, "generate", "--ids", "--helpers", *names])
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    digests = fingerprint.digests(target, ("generate",), ids_in="generate")
    assert lines.pop("generate") == f"{digests['generate']} ids 7001, 7001, 7002"
    assert lines == {name: digests[name] for name in names}
    for arguments, words in (
        ([target.__file__, "nothing"], "expected one of add_gumbel_noise, "),
        ([str(tmp_path / "none.py"), "generate"], "path: expected a Python file"),
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        assert words in capsys.readouterr().err
