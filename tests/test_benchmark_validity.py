"""What the kernel tells about a window of measurement, and which of it makes a run invalid: causes, never times."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import timings

from deploykit.benchmark import conditions
from deploykit.benchmark.conditions import Watch, fixed_work, peak_bytes
from deploykit.benchmark.report import BenchmarkReport, Process
from deploykit.benchmark.validity import disturbances, doubts

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
SECOND = timings.SECOND
MINE = sorted(os.sched_getaffinity(0))
ANOTHER = max(MINE) + 1


class System:
    """A /proc and a /sys as folders, whose counters can be moved while somebody watches."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def cores(self, **ticks: int) -> None:
        """/proc/stat with these ticks, as `mine` or `another`_`column`, on the first core of ours or on another one."""
        columns = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
        lines = ["cpu  0 0 0 0 0 0 0 0 0 0"]
        for whose, core in (("mine", MINE[0]), ("another", ANOTHER)):
            lines.append(" ".join([f"cpu{core}", *(str(1000 + ticks.get(f"{whose}_{name}", 0)) for name in columns)]))
        self.write("proc/stat", "\n".join([*lines, "intr 1 2 3"]))

    def thread(self, number: int, waited_ns: int) -> None:
        self.write(f"proc/self/task/{number}/schedstat", f"111 {waited_ns} 7")


@pytest.fixture
def system(tmp_path, monkeypatch) -> System:
    """One on which no quota is set, whatever holds for the machine that runs the tests."""
    monkeypatch.setattr(conditions, "available_cores", lambda: len(MINE))
    return System(tmp_path)


class TestWhatTheKernelTells:
    def test_a_system_that_tells_nothing_is_asked_nothing(self, system):
        with Watch(system.root) as watch:
            pass

        found = watch.conditions
        assert (found.waited_ns, found.others_ns, found.stolen_ns, found.throttled_ns, found.energy_uj) == (None,) * 5
        assert found.clock_khz == ()
        assert disturbances(found) == {}

    def test_others_time_is_what_these_cores_were_busy_beyond_this_process(self, system):
        system.cores()
        with Watch(system.root) as watch:
            system.cores(mine_user=100, mine_nice=20, mine_system=30, mine_irq=4, mine_softirq=5)

        assert watch.conditions.others_ns == 159 * TICK_NS - watch.conditions.cpu_ns

    def test_where_a_quota_gives_fewer_cores_than_are_seen_the_rest_of_them_disturb_nobody(self, system, monkeypatch):
        monkeypatch.setattr(conditions, "available_cores", lambda: len(MINE) - 1)
        system.cores()
        with Watch(system.root) as watch:
            system.cores(mine_user=500, mine_steal=7)

        assert (watch.conditions.others_ns, watch.conditions.stolen_ns) == (None, 7 * TICK_NS)

    @pytest.mark.parametrize("ticks", [{"mine_idle": 500}, {"mine_iowait": 500}, {"another_user": 500}, {"mine_guest": 500}])
    def test_idling_and_other_cores_and_what_is_counted_twice_are_nobodys(self, system, ticks):
        system.cores()
        with Watch(system.root) as watch:
            system.cores(**ticks)

        assert watch.conditions.others_ns == 0

    def test_stolen_time_is_the_hypervisors(self, system):
        system.cores()
        with Watch(system.root) as watch:
            system.cores(mine_steal=7, another_steal=500)

        assert (watch.conditions.stolen_ns, watch.conditions.others_ns) == (7 * TICK_NS, 0)

    def test_waiting_is_summed_over_threads_whatever_threads_come_and_go(self, system):
        system.thread(1, 1_000)
        system.thread(2, 5_000_000)
        with Watch(system.root) as watch:
            system.thread(1, 1_300)
            (system.root / "proc/self/task/2/schedstat").unlink()
            system.thread(3, 40)

        assert watch.conditions.waited_ns == 340

    @pytest.mark.parametrize(
        ("path", "line", "nanoseconds"),
        [("sys/fs/cgroup/cpu.stat", "throttled_usec", 7_000), ("sys/fs/cgroup/cpu/cpu.stat", "throttled_time", 7)],
    )
    def test_throttling_is_read_from_either_version_of_control_groups(self, system, path, line, nanoseconds):
        system.write(path, f"nr_throttled 99\n{line} 10")
        with Watch(system.root) as watch:
            system.write(path, f"nr_throttled 999\n{line} 17")

        assert watch.conditions.throttled_ns == nanoseconds

    def test_energy_is_that_of_all_packages_and_counts_no_part_twice(self, system):
        def counted(first: int, second: int, part: int) -> None:
            for zone, energy in (("intel-rapl:0", first), ("intel-rapl:1", second), ("intel-rapl:0:0", part)):
                system.write(f"sys/class/powercap/{zone}/energy_uj", energy)

        counted(100, 200, 300)
        with Watch(system.root) as watch:
            counted(111, 205, 999)

        assert watch.conditions.energy_uj == 16

    def test_a_counter_that_ran_over_its_end_tells_nothing(self, system):
        system.write("sys/class/powercap/intel-rapl:0/energy_uj", 262_143_000_000)
        with Watch(system.root) as watch:
            system.write("sys/class/powercap/intel-rapl:0/energy_uj", 5)

        assert watch.conditions.energy_uj is None

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_counter_that_is_there_only_once_tells_nothing(self, system, when):
        if when == "before":
            system.cores()
        with Watch(system.root) as watch:
            (system.root / "proc/stat").unlink(missing_ok=True)
            if when == "after":
                system.cores(mine_user=500)

        assert (watch.conditions.others_ns, watch.conditions.stolen_ns) == (None, None)

    def test_the_clocks_are_read_and_the_fixed_work_done_at_every_look(self, system):
        for core in [*MINE, ANOTHER]:
            system.write(f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", 1_000_000 + core)
        with Watch(system.root) as watch:
            watch.look()

        assert watch.conditions.clock_khz == tuple(1_000_000 + core for core in MINE) * 3
        assert len(watch.conditions.fixed_work_ns) == 3

    def test_the_window_holds_what_was_done_in_it_and_not_the_looks_at_its_ends(self, monkeypatch):
        monkeypatch.setattr(Watch, "look", lambda self: time.sleep(0.5))
        with Watch() as watch:
            time.sleep(0.01)

        assert 10_000_000 <= watch.conditions.wall_ns < 500_000_000

    def test_the_peak_is_that_of_this_program_and_in_bytes(self, system):
        system.write("proc/self/status", "Name:\tpython\nVmPeak:\t  999 kB\nVmHWM:\t   10876 kB\nVmRSS:\t 12 kB")

        assert peak_bytes(system.root) == 10876 * 1024

    def test_the_fixed_work_takes_time(self):
        assert fixed_work(1) > 0


@pytest.fixture
def busy_neighbour() -> Iterator[None]:
    """Another program that wants the one core that this thread may use."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    neighbour = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
        yield
    finally:
        neighbour.kill()
        neighbour.communicate()
        os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("busy_neighbour")
def test_a_busy_neighbour_on_this_machine_is_seen_by_name_of_the_cause():
    with Watch() as watch:
        until = time.process_time_ns() + 200_000_000
        while time.process_time_ns() < until:
            pass

    found = watch.conditions
    if found.others_ns is None or found.waited_ns is None:
        pytest.skip("needs a kernel that tells /proc/stat and schedstat")
    assert found.cores == 1
    assert found.others_ns > 0.1 * found.wall_ns
    assert found.waited_ns > 0.1 * found.wall_ns
    assert {"its threads waited for a core", "other programs used its cores"} <= set(disturbances(found))


CAUSES = (
    ("waited_ns", 2 * SECOND, 0.03, "its threads waited for a core"),
    ("others_ns", 2 * SECOND, 0.05, "other programs used its cores"),
    ("stolen_ns", 2 * SECOND, 0.05, "the hypervisor took its cores away"),
    ("throttled_ns", SECOND, 0.01, "a CPU quota throttled it"),
    ("suspended_ns", SECOND, 0.1, "the machine slept"),
)


class TestADisturbedProcess:
    @pytest.mark.parametrize(("field", "whole", "limit", "cause"), CAUSES)
    def test_is_one_in_which_a_cause_took_more_than_its_share(self, field, whole, limit, cause):
        spent = int(2 * limit * whole)

        assert disturbances(timings.conditions(**{field: spent})) == {cause: spent / whole}

    @pytest.mark.parametrize(("field", "whole", "limit", "cause"), CAUSES)
    def test_is_none_in_which_it_took_less(self, field, whole, limit, cause):
        assert disturbances(timings.conditions(**{field: int(0.9 * limit * whole)})) == {}

    @pytest.mark.parametrize("field", ["waited_ns", "others_ns", "stolen_ns", "throttled_ns"])
    def test_is_none_where_the_kernel_does_not_tell(self, field):
        assert disturbances(timings.conditions(**{field: None})) == {}

    @pytest.mark.parametrize("field", ["others_ns", "stolen_ns"])
    @pytest.mark.parametrize(("ticks", "disturbed"), [(2, False), (4, True)])
    def test_is_none_in_a_short_window_that_saw_a_tick_on_each_core(self, field, ticks, disturbed):
        found = disturbances(timings.conditions(wall_ns=20_000_000, **{field: ticks * 10_000_000}))

        assert bool(found) is disturbed

    def test_names_every_cause(self):
        everything = {field: whole for field, whole, _, _ in CAUSES}

        assert set(disturbances(timings.conditions(**everything))) == {cause for *_, cause in CAUSES}


def run_of(processes: Sequence[Process]) -> tuple[str, ...]:
    """What is doubted about these processes, in the order in which they ran."""
    engines = {label: [ran for ran in processes if ran.label == label] for label in dict.fromkeys(p.label for p in processes)}
    return doubts(engines, processes)


def quiet(count: int = 10, label: str = "a") -> list[Process]:
    return [timings.process(label, *range(1000, 1030)) for _ in range(count)]


class TestDoubts:
    def test_there_are_none_about_a_quiet_run(self):
        assert run_of([*quiet(), *quiet(label="b")]) == ()

    @pytest.mark.parametrize(("field", "whole", "limit", "cause"), CAUSES)
    def test_each_cause_that_hit_many_processes_is_one_with_its_size(self, field, whole, limit, cause):
        disturbed = [timings.process("a", 1000, **{field: whole // 2}) for _ in range(4)]

        assert run_of([*quiet(6), *disturbed]) == (f"a: 4 of 10 processes were disturbed: {cause} (50 % of the time)",)

    def test_a_run_in_which_nothing_tells_whether_others_ran_is_not_valid(self):
        blind = [timings.process("a", 1000, waited_ns=None, others_ns=None) for _ in range(10)]

        assert run_of(blind) == (
            "nothing tells whether other programs ran in 10 of 10 processes: here are neither the time that threads waited for a "
            "core (schedstat) nor what others took of the cores (/proc/stat)",
        )

    @pytest.mark.parametrize("known", ["waited_ns", "others_ns"])
    def test_one_of_the_kernels_two_accounts_of_neighbours_is_enough(self, known):
        unknown = {"waited_ns": None, "others_ns": None, known: 0}

        assert run_of([timings.process("a", 1000, **unknown) for _ in range(10)]) == ()

    def test_causes_that_are_each_rare_are_counted_together(self):
        hit = [timings.process("a", 1000, **{field: whole // 2}) for field, whole, *_ in CAUSES[:3] for _ in range(4)]

        assert run_of([*quiet(8), *hit]) == (
            "a: 12 of 20 processes were disturbed: its threads waited for a core (50 % of the time), "
            "other programs used its cores (50 % of the time), the hypervisor took its cores away (50 % of the time)",
        )

    def test_a_process_that_two_causes_hit_is_one_process(self):
        hit = [timings.process("a", 1000, others_ns=SECOND, stolen_ns=SECOND) for _ in range(2)]

        assert run_of([*quiet(8), *hit]) == ()

    def test_the_size_of_a_cause_is_its_median_over_the_processes_it_hit(self):
        hit = [timings.process("a", 1000, throttled_ns=share * SECOND // 100) for share in (10, 25, 90)]

        assert run_of([*quiet(2), *hit]) == ("a: 3 of 5 processes were disturbed: a CPU quota throttled it (25 % of the time)",)

    def test_an_engine_is_doubted_by_its_own_processes_however_many_quiet_ones_others_have(self):
        hit = [timings.process("b", 1000, waited_ns=SECOND // 2) for _ in range(3)]

        assert run_of([*quiet(10), *quiet(2, "b"), *hit]) == (
            "b: 3 of 5 processes were disturbed: its threads waited for a core (25 % of the time)",
        )

    def test_every_engine_that_was_disturbed_is_named(self):
        hit = [timings.process(label, 1000, others_ns=SECOND) for label in ("a", "b") for _ in range(5)]

        assert [doubt.partition(":")[0] for doubt in run_of([*hit, *quiet(label="c")])] == ["a", "b"]

    @pytest.mark.parametrize(("disturbed", "harm"), [(0, 0), (1, 0), (2, 0), (3, 1), (10, 1)])
    def test_a_few_disturbed_processes_do_no_harm(self, disturbed, harm):
        found = run_of([*quiet(10 - disturbed), *(timings.process("a", 1000, others_ns=SECOND) for _ in range(disturbed))])

        assert len(found) == harm

    @pytest.mark.parametrize("count", [1, 4])
    def test_too_few_processes_for_an_interval(self, count):
        assert run_of(quiet(count)) == (f"a: {count} processes, and an interval takes at least 5",)

    def test_five_processes_are_enough(self):
        assert run_of(quiet(5)) == ()

    def test_the_same_work_that_takes_longer_in_some_processes(self):
        slow = [timings.process("a", 1000, fixed_work_ns=(1_300_000,) * 3) for _ in range(5)]

        assert run_of([*quiet(5), *slow]) == (
            "the same fixed work took 1000 to 1300 µs: the clock changed (throttling), or the cores are shared",
        )

    def test_one_process_in_ten_at_another_clock_does_no_harm(self):
        assert run_of([*quiet(9), timings.process("a", 1000, fixed_work_ns=(9_000_000,) * 3)]) == ()

    def test_one_slow_look_of_three_does_no_harm(self):
        assert run_of([timings.process("a", 1000, fixed_work_ns=(1_000_000, 1_000_000, 9_000_000)) for _ in range(10)]) == ()

    @pytest.mark.parametrize(
        ("first", "last", "words"),
        [
            (1000, 1200, "a: queries get 20 % slower while a process runs (throttling?)"),
            (1200, 1000, "a: queries get 20 % faster while a process runs (more warm-up is needed)"),
        ],
    )
    def test_queries_that_drift_inside_the_processes_of_an_engine(self, first, last, words):
        drifting = [timings.process("a", *[first] * 10, *[1100] * 10, *[last] * 10) for _ in range(10)]

        assert run_of([*drifting, *quiet(label="b")]) == (words,)

    def test_a_drift_in_a_few_processes_does_no_harm(self):
        assert run_of([*quiet(8), *(timings.process("a", *[1000] * 15, *[1500] * 15) for _ in range(2))]) == ()

    @pytest.mark.parametrize("queries", [1, 2])
    def test_from_so_few_queries_that_a_third_has_none_no_drift_is_told(self, queries):
        assert run_of([timings.process("a", *[1000, 9000][:queries]) for _ in range(10)]) == ()

    @pytest.mark.parametrize(("times", "words"), [((1000, 1500), "50 % slower"), ((1500, 1000), "50 % faster")])
    def test_a_run_in_which_everything_drifts(self, times, words):
        drifting = [
            timings.process(label, factor * ns) for ns in times for _ in range(5) for label, factor in (("a", 1), ("b", 9))
        ]

        assert run_of(drifting) == (f"everything got {words} from the first third of the run to the last",)

    def test_processes_at_two_latencies_in_any_order_do_not_drift(self):
        # A third of the run has a median of 1000, the last one of 2000, and so have many other orders of them.
        times = (1000, 2000, 1000, 1000, 2000, 1000, 2000, 1000, 2000, 1000, 2000, 1000, 2000, 2000, 1000)

        assert run_of([timings.process("a", ns) for ns in times]) == ()

    def test_engines_of_different_speed_do_not_drift_when_one_comes_after_the_other(self):
        assert run_of([*(timings.process("a", 1000) for _ in range(10)), *(timings.process("b", 9000) for _ in range(10))]) == ()

    def test_from_fewer_than_fifteen_processes_no_drift_of_the_run_is_told(self):
        assert run_of([timings.process("a", 1000 + 500 * (number > 6)) for number in range(14)]) == ()

    def test_a_run_is_judged_by_the_processes_that_count(self):
        ran = [timings.process("a", 1000, again=again) for again in (False, True) for _ in range(5)]
        disturbed = [timings.process("a", 1000, others_ns=SECOND) for _ in range(5)]

        report = BenchmarkReport((*disturbed, *ran), "a", {"processes": 5, "seed": 0}, timings.HERE)

        assert report.doubts == ()
