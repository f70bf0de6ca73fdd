"""How much training on many devices differs from training on one: the largest differences seen by the layout tests.

    python benchmarks/layouts.py                          # three minutes on two CPU cores

Runs these tests and prints what they record as a table: ten steps from one state on simulated devices, and forty on
two real processes with four devices each. Keys, timesteps, x_t and dropout masks are bit-identical on all of them: the
tests fail otherwise.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

TESTS = ("tests/training/test_parallel.py", "tests/system/test_hosts.py")
WHAT = {
    "test_gradient_of_the_first_step_is_the_same": "the first gradient",
    "test_ten_steps_of_sgd_end_alike": "10 steps of SGD",
    "test_ten_steps_of_adam_end_in_the_same_losses": "10 steps of Adam",
    "test_two_hosts_train_as_one": "40 steps of Adam",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [*TESTS, "-m", "not slow", "-p", "no:cacheprovider"]
        finished = subprocess.run([sys.executable, "-m", "pytest", *tests, f"--junitxml={report}"])
        if finished.returncode:
            sys.exit("the layout tests failed, so there is nothing to report")
        cases = list(ElementTree.parse(report).iter("testcase"))
    print("\n| 1 device vs. | after | quantity | largest difference |\n|---|---|---|---|")
    for case in cases:
        test, _, layout = case.attrib["name"].partition("[")
        largest: dict[str, float] = {}
        for each in case.iter("property"):
            name = each.attrib["name"].removeprefix("largest difference of a ")
            largest[name] = max(largest.get(name, 0.0), float(each.attrib["value"]))
        for name, value in largest.items():
            where = layout.removesuffix("]") or "2 processes x 4 devices (and 8 devices)"
            print(f"| {where} | {WHAT[test]} | {name} | {value:.1e} |")


if __name__ == "__main__":
    main()
