"""Functions in a user's file: loaded once, and every fault of the file is one line that says where."""

import pytest

from ddpm_jax.system.errors import UserError
from ddpm_jax.system.user_code import clear_errors, is_named, load


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("def make(x):\n    return x", "mak", r"has no function mak; did you mean make\?"),
        ("value = 3", "value", "has no function value"),
        ("x = 1\nimport nothing_like_it", "make", r"my.py, line 2: ModuleNotFoundError: No module named"),
        ("def make(:", "make", r"my.py, line 1: SyntaxError: "),
        ("\n\nraise ValueError('two\\nlines')", "make", r"my.py, line 3: ValueError: two lines$"),
    ],
)
def test_a_faulty_file_is_one_line(tmp_path, text, function, message):
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load("model.network", f"{tmp_path}/my.py:{function}")
    assert str(error.value).startswith("model.network: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["my.py", "my.py:", "my:make"])
def test_other_forms_of_name_are_refused(name):
    with pytest.raises(UserError, match=r"must be file.py:function|cannot read"):
        load("model.network", name)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*my.py \(No such file or directory\)"):
        load("data.source", f"{tmp_path}/my.py:make")


def test_a_file_runs_once_for_each_content_of_it(tmp_path):
    file = tmp_path / "my.py"
    file.write_text("token = object()\ndef make():\n    return token")
    first = load("model.network", f"{file}:make")()
    assert load("model.network", f"{file}:make")() is first
    file.write_text(file.read_text() + "\n")
    assert load("model.network", f"{file}:make")() is not first


def test_what_a_function_raises_names_its_line(tmp_path):
    file = tmp_path / "my.py"
    file.write_text("def make():\n    return [][0]")
    make = load("model.network", f"{file}:make")
    with pytest.raises(UserError, match="^here, line 2: IndexError: list index"), clear_errors("here", file):
        make()
    assert is_named(f"{file}:make")
    assert not is_named("tfds:cifar10")
