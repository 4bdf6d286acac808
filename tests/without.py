"""Protections taken away one by one, to see that a test fails without each.

python -m tests.without [--only WORD] [--out docs/reliability-without]

For every row of PROTECTIONS its tests are run twice: as they are, when all must pass, and in processes (MPI
ranks among them) that lack the protection, when each must fail. What each then said is written into a table.
Nothing in hvd_saef knows of this: a process in which HVD_SAEF_WITHOUT names a row replaces attributes of
hvd_saef's modules as soon as it imports `tests`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from xml.etree import ElementTree

NAME = "HVD_SAEF_WITHOUT"
LIMIT = 1800.0
"""Seconds after which tests take for hung what they wait for: far beyond what a slow machine needs."""
PATIENCE = 25.0
"""Seconds after which tests take a job for hung, where it is expected to."""
TIMEOUT = 500.0
WORDS = 110


@dataclass(frozen=True)
class Protection:
    """One of them."""

    promise: str
    without: str
    """What is done in its place, in words."""
    tests: Sequence[str]
    """As pytest takes them."""
    instead: Mapping[str, Any] = field(default_factory=dict)
    """What it is replaced by: "module:attribute" under hvd_saef, and the value."""
    environment: Mapping[str, str] = field(default_factory=dict)


def nothing(*_: Any, **__: Any) -> None:
    """Look at nothing."""


def fine(*_: Any, **__: Any) -> bool:
    """Find everything in order."""
    return True


def no_word(*_: Any) -> Any:
    """A worker's word: nothing is wrong here."""
    from hvd_saef.round.agreement import Word

    return Word.NOTHING


def raise_alone(communicator: Any, word: Any, failure: Exception | None) -> Any:
    """An agreement of which those who fail do not take part."""
    from hvd_saef.round.agreement import Word

    if failure is not None:
        raise failure
    return Word(communicator.combine(int(word)))


def same_line(communicator: Any, number: int) -> Any:
    """The line of all others."""
    return communicator


def each_alone(communicator: Any, prepare: Callable[[], Any]) -> Any:
    """Begin without a word about what went wrong."""
    return communicator.allgather_object(prepare())


def step_anyhow(modes: Any, *_: Any) -> None:
    """Go to the training point, whatever was seen before."""
    modes.leave_x()


def send_all(trip: Any, sent: Any) -> Any:
    """Send what there is, whether or not the sum fits."""
    return sent


def write_in_place(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file under its own name, in two halves."""
    with tempfile.TemporaryFile() as whole:
        write(whole)
        whole.seek(0)
        content = whole.read()
    with open(path, "wb") as file:
        for half in (content[: len(content) // 2], content[len(content) // 2 :]):
            file.write(half)
            file.flush()
            time.sleep(0.02)


def read_trustingly(path: Path, device: str = "cpu") -> Any:
    """Unpickle whatever is there."""
    import torch

    return torch.load(path, map_location=device, weights_only=False)


def decode_any_signs(compressor: Any, payload: Any, out: Any, weight: float) -> None:
    """Take a payload that is refused for zeros."""
    from hvd_saef.kernels import Stretch, twins

    stretch = Stretch(out.flat, compressor._table(out.blocks), payloads=[payload])
    with contextlib.suppress(ValueError, RuntimeError):
        twins.sign_decode([stretch], weights=[weight])


def decode_any_values(compressor: Any, payload: Any, out: Any, weight: float) -> None:
    """Take a payload that is refused for zeros."""
    from hvd_saef.kernels import Stretch, twins

    stretch = Stretch(out.flat, out.blocks.table(compressor.kept), payloads=[payload])
    with contextlib.suppress(ValueError, RuntimeError):
        twins.topk_decode([stretch], compressor._wire(out.blocks.dtype), weights=[weight])


def check(name: str, *ranks: int) -> list[str]:
    """A check of tests/transport/checks.py on MPI, in jobs of so many ranks."""
    return [f"tests/mpi/test_mpi.py::test_check[{name}-{number}-kernels]" for number in ranks]


def job(name: str, *ranks: int) -> list[str]:
    """A test of tests/mpi/test_stalls.py, in jobs of so many ranks."""
    return [f"tests/mpi/test_stalls.py::{name}[{number}]" for number in ranks]


NONFINITE = "tests/round/test_nonfinite.py"
DISAGREEMENT = "tests/round/test_disagreement.py"
PROTECTIONS: dict[str, Protection] = {
    "agreement at the start": Protection(
        "workers that differ in settings or parameters",
        "not compared",
        [
            f"{DISAGREEMENT}::test_different_settings[step_ahead 1.0 on ranks 0, 2 0.5 on rank 1]",
            f"{DISAGREEMENT}::test_different_parameters[{{}}-strides of 'w']",
            *check("everyone_is_told_of_a_mismatch", 2, 4),
        ],
        {"round.origin:check_configuration": nothing},
    ),
    "same start": Protection(
        "workers that start from different parameters",
        "x is not compared",
        [
            f"{DISAGREEMENT}::test_different_start_parameters_and_how_it_goes_on[{{}}]",
            *check("everyone_is_told_of_different_starts", 2, 4),
        ],
        {"round.origin:check_consensus": nothing},
    ),
    "watch": Protection(
        "a rank that does not arrive",
        "who waits does not look how long",
        [
            *job("test_those_who_wait_name_the_missing_rank_and_end_the_job", 2, 4),
            *job("test_a_pause_costs_nothing_but_time", 2, 4),
            *job("test_a_rank_that_never_wraps", 2, 4),
            "tests/transport/test_watch.py::test_a_thread_that_never_arrives",
            "tests/transport/test_watch.py::test_a_thread_that_is_late",
        ],
        {"transport.watch:Stall.look": nothing},
    ),
    "goodbye": Protection(
        "a rank that ends early",
        "it tells nobody",
        job("test_a_rank_that_ends_early_is_told_at_once", 2, 4),
        {"transport.ending:Ending._say_goodbye": nothing},
    ),
    "random": Protection(
        "a compressor that draws random numbers of its own",
        "nothing is tried before training",
        ["tests/compression/test_random.py::test_what_draws_by_itself_is_found"],
        {"optimizer:check_compressors": nothing, "round.parameters:check_compressors": nothing},
    ),
    "denormals": Protection(
        "a rank that flushes denormal numbers while others do not",
        "ranks do not agree on it",
        ["tests/transport/test_background.py::test_ranks_that_differ_are_named_at_the_first_step"],
        {"round.agreement:denormals": nothing},
    ),
    "max_norm": Protection(
        "an embedding that writes to its weight in its forward pass",
        "it is taken",
        ["tests/test_modules.py::test_max_norm_is_refused"],
        {"optimizer:refuse_writing_modules": nothing},
    ),
    "end": Protection(
        "a rank within a collective while another shuts Horovod down",
        "MPI ends under it",
        [
            f"tests/mpi/test_imports.py::test_mpi_does_not_end_under_a_rank_that_is_late[{how}]"
            for how in ("shutdown", "exit", "nodes")
        ],
        {"transport.ending:Ending._before_mpi_ends": nothing},
    ),
    "abort": Protection(
        "a rank that fails between two steps",
        "it does not end the job (HVD_SAEF_NO_ABORT=1)",
        job("test_a_rank_that_fails_takes_the_job_along", 2, 4),
        environment={"HVD_SAEF_NO_ABORT": "1"},
    ),
    "a line for each optimizer": Protection(
        "payloads of several optimizers",
        "all of them talk on one line",
        [
            "tests/round/test_several_optimizers.py::test_each_trains_as_alone[(True, True)-plain]",
            "tests/round/test_several_optimizers.py::test_each_trains_as_alone[(True, False)-plain]",
        ],
        {"transport.communicator:Communicator.line": same_line},
        {"HVD_SAEF_STALL_ABORT_S": "20"},  # or threads that wait for ever keep the process from ending
    ),
    "failures within an exchange are agreed on": Protection(
        "an exception in a compressor",
        "it is not looked for after the round",
        ["tests/round/test_exchange_failures.py::test_the_rank_that_failed_has_the_reason"],
        {"round.round_end:RoundEnd._end_round": nothing},
    ),
    "options are compared": Protection(
        "a learning rate that is set between backward and step(), with overlap=True",
        "early buckets have used the old one",
        [
            "tests/round/test_overlap_changes.py::test_options_changed_after_backward[1-all ranks-lr]",
            "tests/round/test_overlap_changes.py::test_options_changed_during_backward",
        ],
        {"round.armed:Armed.note_options": nothing},
    ),
    "collective calls begin together": Protection(
        "a wrong argument on one rank",
        "that rank raises, and the others go on",
        [
            "tests/round/test_told_to_all.py::test_wrapping[local_steps=0]",
            "tests/round/test_told_to_all.py::test_common_steps[-1-ValueError]",
            "tests/round/test_told_to_all.py::test_recalibrate_batchnorm",
        ],
        {
            "optimizer:together": each_alone,
            "uneven_data:together": each_alone,
            "batchnorm:together": each_alone,
        },
    ),
    "failures are agreed on": Protection(
        "an exception in a closure or a local step",
        "who fails raises before the agreement",
        [
            "tests/transport/test_simulation.py::test_an_exception_in_a_closure[kernels-who0]",
            f"{NONFINITE}::test_an_exception_in_the_local_step",
            *check("everyone_is_told_of_an_exception_in_a_closure", 2, 4),
        ],
        {"round.session:agree": raise_alone, "round.local_steps:agree": raise_alone},
    ),
    "gradients are looked at": Protection(
        "a NaN or an infinity in a gradient",
        "not looked for",
        [
            "tests/round/test_gradients.py::test_a_nonfinite_gradient_raises_on_all",
            *check("everyone_is_told_of_a_nan", 2, 4),
        ],
        {"round.local_steps:look_at_gradients": no_word},
    ),
    "updates are looked at": Protection(
        "a local step that overflows",
        "not looked for",
        [
            f"{NONFINITE}::test_an_update_that_overflows_is_seen_before_x_is_touched",
            f"{NONFINITE}::test_or_skipped_with_a_counter",
            f"{NONFINITE}::test_with_overlap_x_is_as_before",
            f"{NONFINITE}::test_parameters_of_16_bits_that_overflow",
            *check("everyone_is_told_of_an_update_that_overflows", 2, 4),
        ],
        {"kernels:squares_fit": fine},
    ),
    "local steps are undone": Protection(
        "parameters after a local step that overflows",
        "they stay where it left them",
        [f"{NONFINITE}::test_between_local_steps_the_round_begins_anew"],
        {"round.modes:Modes.undo_local_steps": nothing},
    ),
    "the optimizer's state is put back": Protection(
        "a gradient whose square is infinite",
        "Adam keeps the infinity",
        [f"{NONFINITE}::test_gradients_whose_squares_overflow_leave_the_optimizer_as_it_was"],
        {"round.overflow:StateCopy.put_back": nothing},
    ),
    "room in float16": Protection(
        "sums of compressed updates in float16",
        "all is sent, whether or not the sum fits",
        [
            f"{NONFINITE}::test_sums_in_float16_do_not_overflow_and_nothing_is_lost[0-{case}]"
            for case in ("2-60000.0", "4-60000.0", "2-65504.0", "4-1000000.0")  # warm-up sends float32
        ],
        {"round.trip:Trip._with_room": send_all},
    ),
    "sums are looked at": Protection(
        "averaged gradients that overflow in float16",
        "not looked for",
        [f"{NONFINITE}::test_gradients_whose_sum_overflows_in_float16"],
        {"round.synchronization:sums_fit": fine},
    ),
    "consensus": Protection(
        "a flipped bit of one rank's x",
        "x is not compared",
        [
            f"{DISAGREEMENT}::test_a_flipped_bit_of_x_is_found[2-4]",
            *check("a_flipped_bit_of_x_is_found", 2, 4),
        ],
        {"round.round_end:check_consensus": nothing},
    ),
    "guard": Protection(
        "a parameter wrapped twice, converted or resized; another thread",
        "not looked for",
        [
            "tests/round/test_guard.py::test_a_parameter_that_changes_after_wrapping",
            "tests/round/test_guard.py::test_two_wrappers_around_one_parameter",
            "tests/round/test_guard.py::test_another_thread",
        ],
        {"round.guard:Guard.check": nothing},
    ),
    "fork": Protection(
        "a forked process",
        "not looked for",
        ["tests/round/test_guard.py::test_a_forked_process"],
        {"round.guard:Guard.check_process": nothing},
    ),
    "no gradient": Protection(
        "zero_grad() at the wrong time",
        "not warned of",
        ["tests/round/test_guard.py::test_no_gradient_at_all_is_warned_of_once"],
        {"round.guard:Guard.check_gradients": nothing},
    ),
    "eval": Protection(
        "step() in eval mode, gradients taken at x",
        "not looked for",
        ["tests/round/test_guard.py::test_after_eval_a_step_is_refused_and_gradients_at_x_are_warned_of"],
        {"round.modes:Modes.go_on": step_anyhow},
    ),
    "looks": Protection(
        "an evaluation or a save in the middle of a step, in a closure or a hook",
        "the point that was reached is not kept",
        [
            "tests/round/test_looks.py::test_the_update_arrives[by_a_hook_that_stays-True-1-who0]",
            "tests/round/test_looks.py::test_the_update_arrives[by_hooks-True-2-who1]",
            "tests/round/test_moved_parameters.py::test_a_change_between_two_steps_outlives_a_look"
            "[saef-1-evaluation]",
        ],
        {"round.modes:Modes._tell_of_moves": nothing},
    ),
    "looks between forward and backward": Protection(
        "an evaluation or a save between a forward pass and its backward pass",
        "autograd alone looks",
        ["tests/round/test_backward_after_looks.py::test_our_words[save]"],
        {"round.model_hooks:_LookBack.__call__": nothing},
    ),
    "changes while an update is under way": Protection(
        "a parameter changed between backward and step() with overlap=True",
        "not looked for",
        [
            "tests/round/test_moved_parameters.py::test_a_change_before_step_with_overlap_is_told[1-who1]",
            "tests/round/test_sam.py::test_with_overlap_it_is_refused[by_hand-2]",
        ],
        {"round.unstepped:EarlySteps.check": nothing},
    ),
    "steps past ours": Protection(
        "training without step(): by the optimizer's own methods, by one that it holds, or by hand",
        "not looked for",
        [
            "tests/round/test_sam.py::test_sam_wrapped_itself_is_told[2]",
            "tests/round/test_moved_parameters.py::test_training_without_step_is_told_once"
            "[advance-evaluation-saef]",
        ],
        {"optimizer:refuse_steps_past_ours": nothing, "round.unstepped:Unstepped.moved": nothing},
    ),
    "shutdown": Protection(
        "an optimizer used after hvd.shutdown()",
        "not looked for",
        check("after_shutdown_a_step_says_so", 2, 4),
        {"transport.mpi:MpiCommunicator.check": nothing},
    ),
    "files whole or not at all": Protection(
        "kill -9 while saving, full and read-only disks",
        "files are written in place",
        [
            "tests/checkpoints/test_checkpoint_faults.py::test_processes_killed_while_they_save",
            "tests/checkpoints/test_checkpoint_faults.py::test_a_full_disk",
            "tests/checkpoints/test_checkpoint_faults.py::test_a_read_only_folder",
        ],
        {"checkpoints.checkpoint:write_whole": write_in_place},
    ),
    "seal": Protection(
        "a damaged manifest",
        "it carries no hash of itself",
        ["tests/checkpoints/test_checkpoint_faults.py::test_every_damaged_bit_is_found[manifest.json-bit]"],
        {"checkpoints.manifest:_seal": lambda manifest: ""},
    ),
    "hashes": Protection(
        "damaged and truncated files",
        "not compared with the manifest",
        [
            "tests/checkpoints/test_checkpoint_faults.py::test_every_damaged_bit_is_found[rank-bit]",
            "tests/checkpoints/test_checkpoint.py::test_damage_is_named_and_changes_nothing[kernels-flipped]",
        ],
        {"checkpoints.manifest:_hash": lambda path: ""},
    ),
    "sizes and hashes": Protection(
        "lost files, files of another run",
        "not looked for",
        [
            "tests/checkpoints/test_checkpoint.py::test_a_lost_file_can_be_done_without",
            "tests/checkpoints/test_checkpoint_faults.py::test_every_damaged_bit_is_found[rank-longer]",
        ],
        {"checkpoints.checkpoint:damage": lambda folder, files: {}},
    ),
    "names of their own": Protection(
        "files of another run",
        "files of all runs have the same names",
        ["tests/checkpoints/test_checkpoint_faults.py::test_files_of_another_run"],
        {"checkpoints.checkpoint:secrets": SimpleNamespace(token_hex=lambda size: "00")},
    ),
    "partial loads": Protection(
        "a state loaded into a part of the model while training",
        "the rest stays stepped ahead, and becomes x",
        ["tests/round/test_loading.py::test_what_is_not_loaded_stays_at_x[strict=False-3-in a round]"],
        {"round.model_hooks:ModelHooks.before_load": nothing},
    ),
    "plain states": Protection(
        "a torch optimizer's state loaded while training",
        "the parameters stay stepped ahead, and become x",
        ["tests/round/test_loading.py::test_a_plain_optimizers_state_leaves_x[2-in a round-False-train]"],
        {"round.modes:Modes.let_go": nothing},
    ),
    "local steps go on": Protection(
        "a state saved within a round, resumed on rank 0 alone or with other settings",
        "its local steps are dropped",
        [
            "tests/round/test_changed_settings.py::test_x_tilde_is_kept[saef to ef-(3, 3)]",
            "tests/round/test_changed_settings.py::test_x_tilde_is_kept[double-way to single-(3, 3)]",
        ],
        {"round.loaded:Loaded.updates": lambda loaded, state: []},
    ),
    "written by hand": Protection(
        "weights written by hand after loading, on some ranks or all",
        "what was loaded overwrites them",
        ["tests/round/test_loading.py::test_what_is_written_after_loading_is_kept[3-[0, 1]-{}-]"],
        {"round.loaded:Loaded.with_writes": lambda loaded, modes: loaded},
    ),
    "one model a checkpoint": Protection(
        "a checkpoint of ranks that train different parameters",
        "it is saved, and replaces a good one",
        ["tests/checkpoints/test_loadable.py::test_ranks_that_train_other_parameters_replace_no_checkpoint"],
        {"checkpoints.checkpoint:check_configuration": nothing},
    ),
    "read back": Protection(
        "what would not load is not saved",
        "neither tried nor read back",
        ["tests/checkpoints/test_loadable.py::test_extra_state_of_modules_is_looked_at"],
        {
            "checkpoints.checkpoint:as_loadable": lambda value, place: value,
            "checkpoints.checkpoint:_read": read_trustingly,
        },
    ),
    "exact names": Protection(
        "foreign files in a checkpoint's folder",
        "whatever looks like ours is deleted",
        ["tests/checkpoints/test_folders.py::test_only_files_of_our_exact_names_are_deleted"],
        {"checkpoints.manifest:OURS": re.compile(r"step.*-rank.*\.pt|\.step.*\.tmp")},
    ),
    "weights only": Protection(
        "a stranger's checkpoint",
        "it is unpickled",
        ["tests/checkpoints/test_checkpoint_faults.py::test_a_strangers_checkpoint_runs_no_code"],
        {"checkpoints.checkpoint:_read": read_trustingly},
    ),
    "decoders refuse": Protection(
        "payloads of random bytes, truncated ones",
        "taken for zeros",
        ["tests/compression/test_fuzz.py::test_decoders_take_or_refuse_any_bytes"],
        {
            "compression:SignCompressor.decode_add": decode_any_signs,
            "compression:TopKCompressor.decode_add": decode_any_values,
        },
    ),
    "averaging modules": Protection(
        "DistributedDataParallel around the model, put there by a framework",
        "it averages the gradients in full precision",
        [
            "tests/torch_distributed/test_torch_distributed.py::"
            "test_check[2-a_call_of_ddp_around_the_model_is_refused]"
        ],
        {"averaging_modules:_refuse_training": nothing},
    ),
    "versions": Protection(
        "a backward pass that needs parameters as they were before a step",
        "autograd does not hear of what kernels write",
        ["tests/memory/test_parameters.py::test_writing_is_seen_by_autograd[compression0-False]"],
        {"round.trip:raise_versions": nothing},
    ),
    "hooks wait": Protection(
        "step hooks with overlap=True",
        "the optimizer steps once for each bucket, and so do the hooks",
        ["tests/round/test_overlap_steps.py::test_a_moving_average_by_a_hook[{0, 1}]"],
        {"round.overlap:Overlap._hooks_wait": nothing},
    ),
    "weak references": Protection(
        "wrappers that are dropped leave nothing",
        "each is kept",
        ["tests/round/test_guard.py::test_wrapping_and_dropping_leaves_no_owner"],
        {"round.owners:_of_parameters": {}},
    ),
}


def patience(seconds: float = LIMIT) -> float:
    """How long a test waits for a job: less, where a hang is what is expected."""
    return min(seconds, PATIENCE) if os.environ.get(NAME) else seconds


def patches(name: str) -> list[Any]:
    """What replaces what a row of PROTECTIONS names, once it is started."""
    import importlib

    made = []
    for place, value in PROTECTIONS[name].instead.items():
        module, _, attribute = place.partition(":")
        target: Any = importlib.import_module(f"hvd_saef.{module}")
        *owners, last = attribute.split(".")
        for owner in owners:
            target = getattr(target, owner)
        made.append(mock.patch.object(target, last, value))
    return made


def switch_off(name: str) -> None:
    """Replace what a row of PROTECTIONS names, in this process, for good."""
    for patch in patches(name):
        patch.start()


@dataclass
class Seen:
    """What came of one test."""

    protection: str
    promise: str
    without: str
    test: str
    with_it: str
    """"passes", "fails" or "skipped: why"."""
    without_it: str
    """"fails: what it said first", or "passes"."""

    @property
    def good(self) -> bool:
        """Passes, and fails without the protection."""
        return self.with_it == "passes" and self.without_it.startswith("fails: ")


def run_tests(tests: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """What came of each of them, in words; nothing, for those that were not run to their end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        command += [f"--junitxml={report}", *tests]
        with subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as run:
            try:
                run.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                pass
            finally:
                from tests.mpi.launch import end_session

                end_session(run.pid)  # forked processes that hang, ranks that are stopped
        if not report.exists():
            return {}
        return {_name(case): _outcome(case) for case in ElementTree.parse(report).iter("testcase")}


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def _outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag == "skipped":
            return f"skipped: {child.get('message')}"
        if child.tag == "failure":  # the test's own; trouble before it is an "error"
            return f"fails: {_said(child)}"
        if child.tag == "error":
            return f"error: {_said(child)}"
    return "passes"


HERE = f"{Path(__file__).resolve().parents[1]}/"
"""Where the repository is: no message has to say it."""


def _said(child: ElementTree.Element) -> str:
    """Its first words; of a job that hung, how long it was waited for."""
    words = " ".join((child.get("message") or "").replace(HERE, "").split())
    hung = re.search(r"timed out after ([0-9.]+) seconds", words)
    return f"the job hung, and was ended after {float(hung[1]):.0f} s" if hung else words[:WORDS]


def look(name: str) -> list[Seen]:
    """Run the tests of a row of PROTECTIONS with it and without it."""
    row = PROTECTIONS[name]
    good = run_tests(row.tests, {NAME: ""})
    bad = run_tests(row.tests, {NAME: name, **row.environment})
    return [
        Seen(
            name,
            row.promise,
            row.without,
            test,
            good.get(test, "not run to its end"),
            bad.get(test, "not run to its end"),
        )
        for test in {**good, **bad} or row.tests
    ]


def read(out: Path) -> dict[str, list[Seen]]:
    """What an earlier run saw, by row of PROTECTIONS."""
    found: dict[str, list[Seen]] = {}
    with contextlib.suppress(FileNotFoundError), open(out.with_suffix(".csv"), newline="") as file:
        for line in csv.DictReader(file):
            found.setdefault(line["protection"], []).append(Seen(**line))
    return found


def write(rows: Sequence[Seen], out: Path) -> None:
    """The table, and all that was said."""
    with open(out.with_suffix(".csv"), "w", newline="") as file:
        table = csv.DictWriter(file, [column.name for column in fields(Seen)])
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    lines = []
    for name in dict.fromkeys(row.protection for row in rows):
        mine = [row for row in rows if row.protection == name]
        lines += [f"{name}: {mine[0].promise}", f"  without it: {mine[0].without}"]
        lines += [f"  {row.test}: {row.with_it}; {row.without_it}" for row in mine]
    failing = sum(row.good for row in rows)
    lines.append(f"{failing} of {len(rows)} tests pass with the protection and fail without it")
    out.with_suffix(".txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """The command line."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="rows with this in their name; what others gave stays")
    parser.add_argument("--out", type=Path, default=Path("docs/reliability-without"))
    args = parser.parse_args()
    found = read(args.out) if args.only else {}
    for name in tqdm([name for name in PROTECTIONS if args.only in name], desc="protections"):
        found[name] = look(name)
        write([row for name in PROTECTIONS for row in found.get(name, [])], args.out)
    print(args.out.with_suffix(".txt").read_text(), end="")
    sys.exit(not all(row.good for rows in found.values() for row in rows))


if __name__ == "__main__":
    main()
