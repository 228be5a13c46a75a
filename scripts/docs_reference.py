"""An extension of Griffe for the reference: what it reads in our docstrings and in the options of trainers."""

import ast
import re
from typing import Any

import griffe

SECTION = re.compile(r"^(?=(?:Args|Returns|Raises|Yields|Examples|Logs|Attributes|Source):)", re.MULTILINE)


class ReferenceText(griffe.Extension):
    """Docstrings in the form that Griffe parses; the help of an option as the docstring of its field."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite a docstring.

        Args:
            obj: the module, class, function or attribute.
            **kwargs: what other extensions read.
        """
        if obj.docstring:
            obj.docstring.value = parsed_form(obj.docstring.value)

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **kwargs: Any
    ) -> None:
        """Take the help of an option from the metadata of its field.

        Args:
            node: the assignment in the source.
            attr: the field as Griffe found it.
            **kwargs: what other extensions read.
        """
        value = node.value if isinstance(node, ast.AnnAssign) else None
        if attr.docstring or not isinstance(value, ast.Call):
            return
        arguments = {keyword.arg: keyword.value for keyword in value.keywords}
        metadata = arguments.get("metadata")
        if isinstance(metadata, ast.Dict) and (text := help_of(metadata)):
            attr.docstring = griffe.Docstring(text, parent=attr)
            attr.value = default_of(arguments)


def parsed_form(docstring: str) -> str:
    """A docstring with an empty line before each section, and without the roles of Sphinx."""
    text = re.sub(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`", r"`\1`", docstring)
    text = re.sub(r"^Example:", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s+\w+: )>", r"\1\>", text, flags=re.MULTILINE)  # "> 0" is a quotation in Markdown
    return SECTION.sub("\n", text)


def default_of(arguments: dict[str | None, ast.expr]) -> str | None:
    """The default of a field as source text; None if it has none."""
    factory = arguments.get("default_factory")
    default = factory.body if isinstance(factory, ast.Lambda) else arguments.get("default", factory)
    return ast.unparse(default) if default else None


def help_of(metadata: ast.Dict) -> str:
    """The text under "help"; the parts of an f-string that are computed are left out."""
    for key, text in zip(metadata.keys, metadata.values, strict=True):
        if not (isinstance(key, ast.Constant) and key.value == "help"):
            continue
        if isinstance(text, ast.Constant):
            return str(text.value)
        if isinstance(text, ast.JoinedStr):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in text.values)
    return ""
