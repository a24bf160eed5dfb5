"""What the README files say to type can be typed, and what they point at is there."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ddpm.config import build
from ddpm.config.compose import CONF, compose
from ddpm.config.schema import training_config
from ddpm.runs.finding import locate

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("conf", "ddpm", "experiments", "experiments/studies", "tests")
PAGES = ["README.md", *(f"{folder}/README.md" for folder in FOLDERS)]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
OPTUNA = "hydra/sweeper=optuna"


def lines():
    """The words of each line of the pages' bash blocks that starts one of our commands, once."""
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(TEXTS.values()), flags=re.S)
    for line in dict.fromkeys("".join(blocks).replace("\\\n", " ").splitlines()):
        words = shlex.split(line, comments=True)
        if any(word.startswith("ddpm.") for word in words):
            yield words


def commands():
    """(module, overrides) of each of these, sweeps job by job."""
    for words in lines():
        if "--config-dir" in words:
            continue
        started = next(index for index, word in enumerate(words) if word.startswith("ddpm."))
        ends = next(
            (index for index, word in enumerate(words) if index > started and word == "&"),
            len(words),
        )
        yield (
            words[started].removeprefix("ddpm."),
            [
                word if "=" in word else f"study.name={word}"
                for word in words[started + 1 : ends]
                if word not in ("-m", "--help") and not word.startswith("hydra")
            ],
        )


def typed_here():
    """(module, words) of each that needs no network, no second device and no missing package."""
    for words in lines():
        if (
            OPTUNA in words
            and importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None
        ):
            continue
        python = next(
            (
                index
                for index, word in enumerate(words)
                if word == "python" and words[index + 1] == "-m"
            ),
            None,
        )
        if python is not None and not any(
            re.match("data=(?!folder)|from=", word) for word in words
        ):
            module, rest = words[python + 2].removeprefix("ddpm."), words[python + 3 :]
            if not (module == "train" and any(word.startswith("experiment=") for word in rest)):
                yield module, rest


def jobs(overrides):
    """The overrides of each job of a sweep."""
    lists = [[]]
    for override in OverridesParser.create().parse_overrides(
        [override.replace("=~/", "=/home/") for override in overrides]
    ):
        values = [override.input_line]
        if override.is_interval_sweep():
            ends = override.value()
            values = [f"{override.key_or_group}={value}" for value in (ends.start, ends.end)]
        elif override.is_sweep_override():
            values = [f"{override.key_or_group}={one}" for one in override.sweep_string_iterator()]
        lists = [[*before, value] for before in lists for value in values]
    return lists


@pytest.mark.parametrize(
    ("module", "overrides"),
    list(commands()),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_command_of_the_pages_composes(module, overrides):
    for job in jobs(overrides):
        composed = compose(job, "config" if module == "train" else module)
        if module == "train" and composed.cfg.resume is None:
            build.check(training_config(composed))


def test_the_cache_is_cleared_of_nothing_but_decoded_sets_that_no_run_uses(tmp_path):
    cache = tmp_path / "outputs" / "cache"
    for file in ("used/about.json", "unused/about.json", "features/a.npz", "digests/a", "tune/a"):
        (cache / file).parent.mkdir(parents=True)
        (cache / file).touch()
    (tmp_path / "outputs" / "data" / "run").mkdir(parents=True)
    record = tmp_path / "outputs" / "data" / "run" / "run.json"
    record.write_text('{"data": {"cache": "outputs/cache/used"}}')
    (clears,) = re.findall(r"```bash\n(for about in .*?)```", TEXTS["conf/README.md"], flags=re.S)
    subprocess.run(["bash", "-euc", clears], cwd=tmp_path, check=True)
    assert {folder.name for folder in cache.iterdir()} == {"used", "features", "digests", "tune"}


SHORT = {  # appended to what the README says, to try in seconds what takes minutes or days
    "train": [
        "training.steps=2",
        "training.batch_size=2",
        "runtime.num_previews=1",
        "sampler.num_steps=2",
        "schedule.num_timesteps=200",
    ],
    "sample": ["num_samples=2", "sampler.num_steps=2"],
    "evaluate": [
        "evaluation.num_samples=4",
        "evaluation.num_images=2",
        "evaluation.metrics=[losses,bits_per_dim]",
        "sampler.num_steps=2",
    ],
    "compare": ["num_samples=1", "sampler.num_steps=2"],
    "plan": ["probe=0"],
    "study": ["study.show=true"],
}
MYLIB = """
import torch

class Net(torch.nn.Module):
    def __init__(self, resolution: int, in_channels: int, out_channels: int, width: int = 64):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)
    def forward(self, x_t, t):
        return self.conv(x_t)

def betas(num_timesteps: int):
    return torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64)
"""


@pytest.mark.slow
def test_the_commands_of_the_pages_run_as_they_are_written(typed, pictures, tmp_path, monkeypatch):
    pictures("pictures", ["a/1.png", "a/2.png", "b/3.png"])
    for yaml in re.findall(r"```yaml\n(.*?)```", TEXTS["conf/README.md"], flags=re.S):
        file = tmp_path / re.search(r"^# (my/[\w/]+\.yaml)", yaml, flags=re.M)[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml)
    (tmp_path / "mylib.py").write_text(MYLIB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    run, ran = None, set()
    for module, words in typed_here():
        words = [
            re.sub(
                r"=(\.\.\.|outputs/quickstart-digits/recipe-\w+|outputs/\.\.\.)$", f"={run}", word
            )
            for word in words
        ]
        done = typed(
            module,
            *words,
            *SHORT.get(module, []),
            *(["training.steps=4"] if any(word.startswith("resume=") for word in words) else []),
            *(["hydra.sweeper.n_trials=1"] if OPTUNA in words else []),
            *(["model.base_channels=32"] if module == "train" and "model=unet64" in words else []),
        )
        assert done.code == 0, (module, words, done.err)
        run = run or done.run
        ran.add(module)
    assert ran == {"train", "compare", "plan", "sample", "evaluate", "export", "study"}
    library, parts = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    library = re.sub(r'load\("outputs/[^"]+"\)', f'load("{run}")', library)
    library = library.replace("dpmpp20", "ddim10").replace(", classes=[3]", "")
    for code in (library, parts):
        assert len(code.splitlines()) <= 12
        names: dict[str, object] = {}
        exec(code, names)
        assert len(names["images"]) in (4, 16)


@pytest.mark.parametrize(
    "file",
    ["README.md", "ddpm/README.md", "ddpm/sample/__main__.py", "ddpm/evaluate/__main__.py"],
)
def test_the_example_of_a_run_is_the_quick_starts(file):
    quickstart = compose([])
    run = locate(training_config(quickstart))
    assert set(re.findall(r"run=(outputs/[\w/-]+)", (ROOT / file).read_text(encoding="utf-8"))) == {
        run.path.as_posix()
    }


def test_the_readme_has_two_commands_to_set_up():
    assert len(re.findall(r"^pip install .*&&", README, flags=re.M)) == 2


def test_the_table_of_options_names_every_option_of_every_group():
    page = TEXTS["conf/README.md"]
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", page, flags=re.M))
    others = {"hydra", "expect"}  # nobody chooses among these
    groups = [path.name for path in CONF.iterdir() if path.is_dir() and path.name not in others]
    assert {
        group: [
            file.stem
            for file in (CONF / group).glob("*.yaml")
            if f"`{file.stem}`" not in rows.get(group, "")
        ]
        for group in groups
    } == {group: [] for group in groups}


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_points_at_is_there(page):
    links = re.findall(r"\]\(((?!http)[^)]+)\)|src=\"([^\"]+)\"", TEXTS[page])
    links = [link or source for link, source in links]
    assert links
    folder = (ROOT / page).parent
    broken = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = folder / file if file else ROOT / page
        found = target.is_file() or target.is_dir()
        if not found or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


def test_the_first_page_is_short():
    """About 1,200 words are read to their end."""
    assert len(README.split()) <= 1300


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_its_most_useful_command(page):
    first = re.search(r"```bash\n(.*?)\n```", TEXTS[page], flags=re.S)
    assert first
    assert "python -m" in first[1]
    assert page == "README.md" or TEXTS[page].index(first[0]) < 100


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_fit_a_screen(page):
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.S)
    assert [
        line
        for line in prose.splitlines()
        if len(line) > 110 and not line.startswith(("|", "!", "<"))
    ] == []
