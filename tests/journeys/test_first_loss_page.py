"""The page of a student: each cell raises, warns and prints what the page says."""

from pathlib import Path

from page_runner import blocks_of, run_page

PAGE = Path(__file__).parents[2] / "docs/journeys/first-loss.md"


def test_the_page_of_a_first_loss(tmp_path):
    ran = run_page(PAGE, tmp_path)
    outputs = iter(ran)
    output = ""
    shown = 0
    for block in blocks_of(PAGE.read_text()):
        if block.language == "python":
            output = next(one.output for one in outputs if one.source.strip() == block.source.strip())
        elif block.language == "text":
            shown += 1
            for line in block.source.splitlines():
                assert line in output, (block.line, output)
    assert shown == 6
    errors = [block for block in blocks_of(PAGE.read_text()) if "# ValueError: " in block.source]
    assert len(errors) == 13
