"""Messages of other packages that a command leaves out, and only these."""

import logging
import subprocess
import sys
import warnings

import pytest

from rlhf.cli.quiet import MESSAGES, is_debugging, leave_out_messages


@pytest.fixture
def quiet():
    filters = {name: list(logging.getLogger(name).filters) for name in MESSAGES}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        leave_out_messages()
        yield told
    for name, before in filters.items():
        logging.getLogger(name).filters = before


def test_warnings_are_left_out_by_their_words_alone(quiet):
    warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
    warnings.warn("`gradient_checkpointing_kwargs` is deprecated and will be removed.", FutureWarning, stacklevel=1)
    warnings.warn("`another_option` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
    warnings.warn("`is_gradient_checkpointing` is deprecated", UserWarning, stacklevel=1)  # somebody else's
    assert [(str(one.message)[:20], one.category) for one in quiet] == [
        ("`another_option` is ", FutureWarning),
        ("`is_gradient_checkpo", UserWarning),
    ]


def test_messages_are_left_out_by_their_logger_and_words(quiet, caplog):
    name = "transformers.modeling_layers"
    logging.getLogger(name).warning("Caching is incompatible with gradient checkpointing in LlamaDecoderLayer.")
    logging.getLogger(name).warning("Something else")
    logging.getLogger("other").warning("Caching is incompatible with gradient checkpointing")
    assert [(record.name, record.getMessage()[:14]) for record in caplog.records] == [
        (name, "Something else"),
        ("other", "Caching is inc"),
    ]


def test_debug_and_a_variable_bring_them_back(monkeypatch):
    monkeypatch.delenv("RLHF_DEBUG", raising=False)
    assert is_debugging(True) and not is_debugging(False)
    monkeypatch.setenv("RLHF_DEBUG", "1")
    assert is_debugging(False)


def test_a_program_that_imports_the_package_keeps_its_configuration_of_warnings():
    code = (
        "import logging, warnings; before = list(warnings.filters); import rlhf.cli.main, rlhf.cli.quiet\n"
        "assert warnings.filters == before and not logging.getLogger('transformers.modeling_layers').filters"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
