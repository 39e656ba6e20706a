"""The rules of docs/architecture.md that a machine can hold."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "speedrun_mup"

# Lowest first. A module may import from its own floor's members only if it is listed after them, and from any floor below.
FLOORS = [
    ["core.errors", "core.registry", "core.seeds"],
    [
        "core.device",
        "core.distributed",
        "core.mup",
        "core.kernels.triton",
        "core.utils",
        "callables",
        "files",
        "interrupts",
        "packages",
        "pictures",
        "terminal",
        "training.schedules",
        "training.schedule_options",
        "training.signals",
    ],
    ["core.kernels.fp8", "core.optimizers"],
    [
        "core.model",
        "presets",
        "scaling",
        "synonyms",
        "flags",
        "settings",
        "sample.sampling",
        "editions",
        "param_groups",
        "techniques",
        "config",
        "config_file",
        "setting_flags",
        "sweep_flags",
    ],
    [
        "training.checkpoint",
        "training.flops",
        "training.hardware",
        "training.checkpoint_manifest",
        "training.memory",
        "training.model_config",
        "training.divergence",
        "training.safetensors_writer",
        "training.trackers",
        "training.tracking",
    ],
    ["data"],
    ["training.run_folder", "sample", "evaluate"],
    ["training"],
    [
        "ablate",
        "bench",
        "bench_generate",
        "coord_check",
        "doctor",
        "explain",
        "export",
        "functions",
        "plan",
        "report",
        "sweep",
        "transfer",
    ],
    ["commands", "cli"],
]


MOST_LINES, MOST_METHODS, MOST_FUNCTION_LINES = 500, 20, 60  # the last without the docstring
# What is larger, and why it may be. An entry whose subject has shrunk has to go.
LARGER: dict[str, str] = {}


# What means something on one machine only: its folders, absolute or hidden, trackers and registries.
FOREIGN = (
    r"/tmp/|/root/|/home/|file://",
    r"(?<![\w.:/<~-])/(?!dev/|proc/|sys/|usr/|etc/)[\w.]+/",
    r"/\.(?!cache\b|download\b|venv\b|ci\b)\w",
    r"issue #\d|pypi\.org",
)


def floor_of(module: str) -> int:
    """Number of the floor that `module` (without the package's name) is on."""
    for number, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    raise AssertionError(f"{module} is on no floor: add it to FLOORS and to docs/architecture.md")


@cache
def modules() -> list[tuple[str, ast.Module]]:
    """The package's modules, each with its syntax tree: parsed once for all tests of a process."""
    return list(_modules())


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "__main__", "core", "core.kernels", "training"):
            yield name, ast.parse(path.read_text())


def imports_of(tree: ast.Module):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speedrun_mup"):
            module = node.module.removeprefix("speedrun_mup").lstrip(".")
            for alias in node.names:
                joined = f"{module}.{alias.name}".lstrip(".")
                yield (
                    joined
                    if (PACKAGE / (joined.replace(".", "/") + ".py")).exists() or module in ("", "core")
                    else module
                )
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("speedrun_mup.") for a in node.names if a.name.startswith("speedrun_mup."))


def test_imports_point_down():
    for name, tree in modules():
        for target in imports_of(tree):
            if target in ("__version__", ""):
                continue
            assert floor_of(target) <= floor_of(name), f"{name} imports {target} from a higher floor"


def test_every_module_that_is_imported_exists():
    """Also in functions, where nothing else looks: mypy passes over modules that it does not find."""
    for name, text in every_module():
        for node in ast.walk(ast.parse(text)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for path in (PACKAGE.parent / module.replace(".", "/") for module in modules):
                own = path.parts[: len(PACKAGE.parts)] == PACKAGE.parts
                assert not own or path.is_dir() or path.with_suffix(".py").exists(), f"{name} imports {path}"


def test_the_physics_knows_nothing_of_the_laboratory():
    for name, tree in modules():
        if name.startswith("core."):
            assert all(target.startswith("core") for target in imports_of(tree)), name


def test_every_public_name_is_documented():
    for name, tree in modules():
        assert ast.get_docstring(tree), f"{name} has no docstring"
        for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            for node in scope.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    is_setter = any(getattr(decorator, "attr", "") == "setter" for decorator in node.decorator_list)
                    assert is_setter or ast.get_docstring(node), f"{name}.{node.name} has no docstring"


def test_no_script_is_named_like_a_standard_module():
    for path in [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert path.stem not in sys.stdlib_module_names, path


def test_nothing_is_checked_with_assert_or_unpickled():
    for name, tree in modules():
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Assert), f"{name}:{node.lineno}: python -O would strip this check"
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"pickle\.load|weights_only\s*=\s*False|\beval\(|\bexec\(", path.read_text()), path


def test_the_project_speaks_of_itself_only():
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *PACKAGE.rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]:
        text = path.read_text()
        for foreign in FOREIGN:
            assert not re.search(foreign, text), f"{path} has {foreign}"


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", readme, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for script in re.findall(r"python (\S+\.py)", readme):
        assert (ROOT / script).exists(), script


def test_the_layout_names_every_module():
    layout = (ROOT / "docs" / "architecture.md").read_text()
    layout = layout.split("## Floors")[0]
    for path in [*PACKAGE.glob("*"), *PACKAGE.rglob("*.py")]:
        inner = {"compat", "commands", "tokenize_text", "options"} & set(path.relative_to(PACKAGE).parts[:-1])
        if not path.name.startswith("__") and path.name != "py.typed" and not inner:
            assert re.search(rf"\b{path.stem}(\.py|/)", layout), f"docs/architecture.md does not mention {path.name}"


def test_the_page_has_the_floors_of_the_test():
    page = (ROOT / "docs" / "architecture.md").read_text().split("## Floors")[1].split("\n## ")[0]
    lines = re.findall(r"^\d+\. (.+(?:\n   .+)*)", page, re.M)
    assert [sorted(re.findall(r"`([\w.]+)`", line)) for line in lines] == [sorted(names) for names in FLOORS]


def test_the_readme_names_every_command_and_links_to_what_exists():
    readme = (ROOT / "README.md").read_text()
    for path in (PACKAGE / "commands").glob("*.py"):
        name = path.stem.replace("_", "-")
        assert path.stem == "__init__" or re.search(rf"\b{name}\b", readme), f"README.md does not mention {name}"
    for target in re.findall(r"\]\((?!http)([^)#]+)", readme):
        assert (ROOT / target).exists(), target


def test_the_log_has_a_dated_result_per_entry_in_six_lines_at_most():
    entries = re.split(r"^(?=## )", (ROOT / "docs" / "LOG.md").read_text(), flags=re.M)[1:]
    heads = [re.fullmatch(r"## (\d{4}-\d\d-\d\d): .+", entry.splitlines()[0]) for entry in entries]
    assert all(heads), [entry.splitlines()[0] for entry, head in zip(entries, heads, strict=True) if not head]
    dates = [head[1] for head in heads]
    assert dates == sorted(dates, reverse=True), "the newest entry comes first"
    for entry in entries:
        lines = entry.strip().splitlines()
        assert len(lines) <= 8 and all(len(line) <= 120 for line in lines), f"too long: {lines[0]}"


def test_pages_link_to_what_exists_and_the_file_tree_of_the_readme_does():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
    tree = (ROOT / "README.md").read_text().split("## What is where\n\n```\n")[1].split("```")[0]
    for path in re.findall(r"(?:^|  )(\S+(?:\.py|/))(?=\s|$)", tree, re.M):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), f"the file tree of README.md names {path}"


def too_large():
    """Names of files, classes and functions that are over their limit, with what they have."""
    for name, tree, lines in ((name, ast.parse(text), text.count("\n")) for name, text in every_module()):
        if lines > MOST_LINES:
            yield name, lines
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
                if methods > MOST_METHODS:
                    yield f"{name}.{node.name}", methods
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                told = node.body[0] if ast.get_docstring(node) else None
                of_docstring = (told.end_lineno or 0) - told.lineno + 1 if told else 0
                length = (node.end_lineno or 0) - node.lineno + 1 - of_docstring
                if length > MOST_FUNCTION_LINES:
                    yield f"{name}.{node.name}", length


def every_module():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path.read_text()


def test_files_classes_and_functions_are_small():
    found = dict(too_large())
    assert not found.keys() - LARGER.keys(), (
        f"too large: { {name: found[name] for name in found.keys() - LARGER.keys()} }"
    )
    assert not LARGER.keys() - found.keys(), (
        f"no longer too large, take them off LARGER: {LARGER.keys() - found.keys()}"
    )


def imported_at_the_top(body):
    """The import statements of a module that run with it, or that a type checker follows: not those in functions."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from imported_at_the_top(getattr(node, part, []))


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports, TYPE_CHECKING included. A package counts where its __init__ is meant.

    Left out is the package's own __init__: it offers load_run, which is imported when it is asked for, and the version.
    """
    texts = dict(every_module())
    graph = {}
    for name, text in texts.items():
        targets = set()
        for node in imported_at_the_top(ast.parse(text).body):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speedrun_mup"):
                module = (node.module or "").removeprefix("speedrun_mup").lstrip(".")
                joined = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
                targets |= {one if one in texts else module for one in joined}
            elif isinstance(node, ast.Import):
                targets |= {alias.name.removeprefix("speedrun_mup.") for alias in node.names}
        graph[name] = targets & texts.keys() - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The groups of nodes from each of which every other one of the group can be reached."""
    reach = {name: set(targets) for name, targets in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = (frozenset(other for other in reach[name] if name in reach[other]) for name in graph)
    return {group for group in groups if group}


def test_no_modules_import_each_other():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == {frozenset("abc")}
    found = circles(import_graph())
    assert not found, f"a circle of imports: {[sorted(one) for one in found]}"
