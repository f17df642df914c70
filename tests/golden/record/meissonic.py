"""viiika/Meissonic: `Scheduler.step`, a copy of aMUSEd's.

python tests/golden/record/meissonic.py --source <checkout>
"""

from amused import guidance, record, scheduler_module
from common import source_argument


def main():
    source = source_argument()
    code = scheduler_module(source / "src/scheduler.py")
    for name, known, temperature, rule in (
        ("meissonic", (0, 0), (2, 0), "amused"),
        ("meissonic-known", (3, 12, 15), (1, 0), {"preset": "amused", "choice_temperature": 1.0}),
    ):
        record(code, code.Scheduler, source, name, rule, codebase="viiika/Meissonic", known=known,
               function="Scheduler.step", temperature=temperature, seed=len(name), steps=8)  # fmt: skip
    record(code, code.Scheduler, source, "meissonic-cfg-bf16", "meissonic", known=(0, 5), seed=13,
           codebase="viiika/Meissonic", function="Scheduler.step", dtype="bfloat16", scale=9.0,
           guide=guidance(source / "src/pipeline.py", "Pipeline.__call__"))  # fmt: skip


if __name__ == "__main__":
    main()
