"""The runner of pages: what it runs, and what it refuses."""

import textwrap

import pytest
from page_runner import PageError, blocks_of, expected_error, run_page, shell_lines


def written(folder, *blocks):
    page = folder / "page.md"
    page.write_text("# A page\n\n" + "\n\nText.\n\n".join(textwrap.dedent(block).strip() for block in blocks) + "\n")
    (folder / "work").mkdir()
    return page, folder / "work"


def test_a_page_is_run_in_order(tmp_path):
    page, folder = written(
        tmp_path,
        """
        ```python title="script.py"
        import sys
        print("script", sys.argv[1:], open("data.txt").read())
        ```
        """,
        """
        ```sh
        echo "some $((1 + 1))" > data.txt
        ```
        """,
        """
        ```sh
        python script.py one \\
            two > printed.txt
        rlhf --version
        rlhf sft --nonsense 3  # status 2
        ```
        """,
        """
        ```python
        x = 1
        ```
        """,
        """
        ```python
        x + 1
        int("one")
        # ValueError: invalid literal
        # for int()…
        ```
        """,
        """
        ```
        not run
        ```
        """,
    )
    ran = run_page(page, folder, replace={"one": "1+1", "some": "any"})
    assert (folder / "printed.txt").read_text() == "script ['1+1', 'two'] any 2\n\n"
    assert [one.status for one in ran] == [0, 0, 0, 2, 0, 0]
    assert "--nonsense" in ran[3].output and ran[2].output.strip()[0].isdigit()
    assert len(blocks_of(page.read_text())) == 6


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("```sh\nrlhf sft --nonsense 3\n```", "status 2, expected 0"),
        ("```sh\nrlhf --version  # status 2\n```", "status 0, expected 2"),
        ("```sh\nfalse\ntrue\n```", "status 1, expected 0"),
        ("```python\n1 / 0\n```", "ZeroDivisionError"),
        ("```python\n1 / 1\n# ZeroDivisionError: by zero\n```", "no ZeroDivisionError"),
        ("```python\n1 / 0\n# ZeroDivisionError: by one\n```", "the message is: division by zero"),
    ],
)
def test_a_block_that_does_something_else_fails_the_page(tmp_path, block, words):
    page, folder = written(tmp_path, block)
    with pytest.raises(PageError, match=words):
        run_page(page, folder)


def test_a_replacement_that_the_page_does_not_have_is_refused(tmp_path):
    page, folder = written(tmp_path, "```sh\ntrue\n```")
    with pytest.raises(PageError, match="does not occur"):
        run_page(page, folder, replace={"SmolLM2": "x"})


def test_lines_that_run_here():
    lines = shell_lines(
        "# a comment\nprintf 'Hi\\n' | rlhf chat runs/sft\nrlhf chat m <<'END'\na\nb\nEND\nrlhf eval < q.txt\n"
    )
    assert [(line.words, line.input_command, line.input_text) for line in lines] == [
        (["rlhf", "chat", "runs/sft"], "printf 'Hi\\n' ", None),
        (["rlhf", "chat", "m"], None, "a\nb\n"),
        (["rlhf", "eval"], "cat q.txt", None),
    ]
    for text in (
        "rlhf sft &",
        "rlhf sft && echo x",
        "for x in 1; do\nrlhf sft\ndone",
        "rlhf chat $MODEL",
        "python -m x",
    ):
        assert shell_lines(text) is None


def test_an_expected_error_is_the_last_comment():
    assert expected_error("x\n# ValueError: a\n# b…\n") == ("ValueError", "a b")
    assert expected_error("# ValueError: a\nx\n") is None
