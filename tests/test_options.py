"""Options: the same dataclass from the command line and from YAML, and one sentence for whatever doesn't fit."""

import os
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import pytest

from puna.errors import UserError
from puna.options import argument, group, help_text, option, overrides, parse, to_yaml


@dataclass(kw_only=True)
class Shared:
    """Shared by verbs. More on it."""

    model: str = argument("the model")
    top_p: float | None = option(None, "nucleus", above=0)


@dataclass(kw_only=True)
class Options(Shared):
    """Do the thing.

    Examples:
      puna thing model
    """

    prompt: tuple[str, ...] = argument("prompts", default=())
    to: Literal["hf", "gguf"] = option("hf", "format", aliases=("kind",), old_values={"ggml": "gguf"})
    max_tokens: int = option(16, "how many", minimum=1, aliases=("length",))
    stop: tuple[str, ...] | None = option(None, "stop at", escapes=True)
    lens: tuple[int, ...] = option((1, 2), "lengths", minimum=1)
    bias: dict[int, float] | None = option(None, "bias")
    early: bool | Literal["never"] = option(False, "early")
    chat: bool = option(False, "chat")
    verify: bool = option(True, "compare", aliases=("proof",))
    out: Path | None = option(None, "file", writes="file")
    seed: int = option(0, "seed")


def thing(*words: str) -> Options:
    return parse("thing", Options, words)


def refuse(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        thing(*words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_types():
    assert thing("m") == Options(model="m")
    got = thing(
        "m", "--top-p", ".5", "--lens", "128,512", "--bias", "{13: -100}", "--out", "x.json", "--early", "never"
    )
    want = Options(model="m", top_p=0.5, lens=(128, 512), bias={13: -100.0}, out=Path("x.json"), early="never")
    assert got == want


def test_dashes_and_underscores_are_one():
    assert thing("m", "--max-tokens", "8") == thing("m", "--max_tokens=8") == Options(model="m", max_tokens=8)


def test_positionals_may_stand_anywhere():
    assert thing("m", "one", "--max-tokens", "3", "two").prompt == ("one", "two")
    assert thing("--chat", "m", "- a list", "-1.5", "-", "--", "--to").prompt == ("- a list", "-1.5", "-", "--to")
    assert thing("--model", "m", "one") == Options(model="m", prompt=("one",))


def test_values_may_begin_with_a_dash():
    assert thing("m", "--seed", "-5").seed == -5
    assert thing("m", "--stop", "a,b", "--stop=--end").stop == ("a,b", "--end")


def test_flags():
    assert thing("m", "--chat").chat and not thing("m", "--chat", "--no-chat").chat
    assert thing("m", "--verify=false").verify is thing("m", "--no-verify").verify is False


def test_yaml_holds_the_same_keys_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nmax-tokens: 3\ntop_p: 1e-1\nstop: [x, y]\nlens: 7\nchat: yes\nprompt: hello\n")
    want = Options(model="m", max_tokens=3, top_p=0.1, stop=("x", "y"), lens=(7,), chat=True, prompt=("hello",))
    assert thing("--config", str(file)) == thing(str(file)) == want
    assert thing(str(file), "--max-tokens", "9", "--no-chat").max_tokens == 9
    over = tmp_path / "over.yml"
    over.write_text("max_tokens: 4")
    assert thing(str(file), "--config", str(over)).max_tokens == 4


def test_nesting_without_end_is_a_sentence(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("stop: " + "[" * 5000)
    with pytest.raises(UserError, match="run.yaml is not valid YAML: lists or mappings are nested too deeply"):
        thing(str(file))
    with pytest.raises(UserError, match="--bias takes a mapping"):
        thing("m", "--bias", "[" * 5000)


def test_positionals_fill_what_the_file_leaves_open(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m")
    assert thing(str(file), "tell me").prompt == ("tell me",)
    assert thing(str(file), "--model", "other").model == "other"


def test_positionals_override_a_file_given_by_config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nprompt: hello")
    assert thing("other", "tell me", "--config", str(file)) == Options(model="other", prompt=("tell me",))
    assert thing("--config", str(file), "other") == Options(model="other", prompt=("hello",))


def test_an_options_file_is_a_regular_file_of_bounded_size(tmp_path, monkeypatch):
    pipe, long = tmp_path / "pipe.yaml", tmp_path / "long.yaml"
    os.mkfifo(pipe)
    assert refuse("--config", str(pipe)).endswith("is not a regular file; puna reads no pipes or devices.")
    long.write_text("model: m # " + "x" * (1 << 20))
    assert "is larger than the 1,048,576 bytes" in refuse(str(long))


def test_to_yaml_gives_the_options_back(tmp_path, capsys):
    words = ["m", "a", "b", "--max-tokens", "3", "--stop", "ü", "--bias", "{1: 2}", "--out", "x", "--no-verify"]
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(thing(*words)))
    assert thing(str(file)) == thing(*words)
    with pytest.raises(SystemExit) as done:
        thing(*words, "--print-config")
    assert done.value.code == 0 and capsys.readouterr().out == file.read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("m", "--max-tokns", "3"), "puna thing has no option --max-tokns (did you mean '--max-tokens'?)"),
        (("m", "--zzz"), "puna thing has no option --zzz (see puna thing --help)"),
        (("m", "-x"), "puna thing has no option -x (see puna thing --help)"),
        (("m", "--max-tokens", "many"), "--max-tokens takes a whole number, not 'many'"),
        (("m", "--max-tokens", "1.5"), "--max-tokens takes a whole number, not '1.5'"),
        (("m", "--max-tokens", "1_0"), "--max-tokens takes a whole number, not '1_0'"),
        (("m", "--max-tokens", " 3 "), "--max-tokens takes a whole number, not ' 3 '"),
        (("m", "--max-tokens", "٣"), "--max-tokens takes a whole number, not '٣'"),
        (("m", "--max-tokens", "0"), "--max-tokens must be at least 1, not 0"),
        (("m", "--lens", "4,-1"), "--lens must be at least 1, not -1"),
        (("m", "--top-p", "0"), "--top-p must be above 0, not 0.0"),
        (("m", "--top-p", "1_0.5"), "--top-p takes a number, not '1_0.5'"),
        (("m", "--top-p", "inf"), "--top-p takes a number, not 'inf'"),
        (("m", "--top-p", "nan"), "--top-p takes a number, not 'nan'"),
        (("m", "--lens", "1,x"), "--lens takes whole numbers, as in 1,4,16, not ['1,x']"),
        (("m", "--bias", "[1]"), "--bias takes a mapping, as in '{13: -100}', not '[1]'"),
        (("m", "--bias", "{"), "--bias takes a mapping, as in '{13: -100}', not '{'"),
        (("m", "--to", "ggf"), "--to takes hf or gguf, not 'ggf' (did you mean 'gguf'?)"),
        (("m", "--early", "late"), "--early takes true or false or never, not 'late'"),
        (("m", "--chat=maybe"), "--chat takes true or false, not 'maybe'"),
        (("m", "--max-tokens"), "--max-tokens needs a value: a whole number"),
        (("m", "--max-tokens", "--chat"), "--max-tokens needs a value: a whole number"),
        ((), "puna thing needs MODEL: the model (see puna thing --help)"),
        (("--config",), "--config needs a value: a YAML file"),
        (("m", "--config", "nowhere.yaml"), "nowhere.yaml can't be read: No such file or directory."),
    ],
)
def test_one_sentence(words, says):
    assert refuse(*words) == says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\nmax_tokns: 3", "puna thing has no option 'max_tokns' (did you mean 'max_tokens'?)"),
        ("model: m\nmax_tokens: 3.5", "puna thing: max_tokens takes a whole number, not 3.5"),
        ("model: m\nprompt: yes", "puna thing: prompt takes text, not True"),
        ("- 1", "takes a mapping of option names to values, not [1]"),
        ("a: [b\nc: d", "is not valid YAML at line 2, column 2: expected ',' or ']', but got ':'"),
    ],
)
def test_one_sentence_about_the_file(tmp_path, text, says):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refuse(str(file))
    assert message.startswith(str(file)) and message.endswith(says)


def test_former_spellings_work_with_a_note(tmp_path, capsys):
    assert thing("m", "--length", "3", "--to", "ggml", "--no-proof") == Options(
        model="m", max_tokens=3, to="gguf", verify=False
    )
    notes = capsys.readouterr().err
    assert notes.splitlines() == [
        "note: --length is now --max-tokens.",
        "note: --to ggml is now --to gguf.",
        "note: --no-proof is now --no-verify.",
    ]
    thing("m", "--kind", "ggml")
    assert capsys.readouterr().err == "note: --kind ggml is now --to gguf.\n"
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nlength: 3\nproof: false\nto: ggml\n")
    assert thing(str(file)) == Options(model="m", max_tokens=3, to="gguf", verify=False)
    assert f"note: {file}: puna thing: length is now max_tokens.\n" in capsys.readouterr().err


def test_escapes_on_the_command_line_only(tmp_path):
    assert thing("m", "--stop", r"\n\t\\n\d\x41\u00e9").stop == ("\n\t\\n\\dAé",)
    file = tmp_path / "run.yaml"
    file.write_text(r"stop: '\n'")
    assert thing("m", "--config", str(file)).stop == (r"\n",)


def test_what_can_not_be_written_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for out, says in (
        (".", "must name a file of its own"),
        ("..", "must name a file of its own"),
        ("", "must name a file of its own"),
        ("folder", "is a folder"),
        ("new/", "is a folder"),
        ("nowhere", "is a symbolic link to nothing"),
        ("missing/x.json", "is in a folder that doesn't exist"),
    ):
        assert says in refuse("m", "--out", out), out
    assert thing("m", "--out", "folder/x.json").out == Path("folder/x.json")


def test_too_many_positionals():
    with pytest.raises(UserError, match="puna chat has no place for the argument 'two'"):
        parse("chat", Shared, ["one", "two"])


def test_required_options():
    @dataclass(kw_only=True)
    class Needs:
        to: str = option(MISSING, "where to")

    with pytest.raises(UserError, match=r"puna x needs --to: where to \(see puna x --help\)"):
        parse("x", Needs, [])


def test_help_shows_every_option_by_its_dashed_name():
    text = help_text("thing", Options)
    assert text.startswith("usage: puna thing MODEL [PROMPT...] [options]\n\nDo the thing.")
    for part in (
        "--max-tokens N",
        "(default: 16)",
        "--to hf|gguf",
        "--verify, --no-verify",
        "--lens N,...",
        "Shared by verbs",
    ):
        assert part in text
    assert "_" not in text and max(map(len, text.splitlines())) <= 120


@dataclass(kw_only=True)
class Optim:
    """How weights change."""

    lr: float = option(1e-3, "learning rate")
    betas: tuple[float, ...] = option((0.9, 0.95), "averages")


@dataclass(kw_only=True)
class Data:
    """What is read."""

    train: tuple[str, ...] = option(MISSING, "token data")


@dataclass(kw_only=True)
class Nested:
    """A run of many options."""

    steps: int = option(1, "steps")
    data: Data = group(Data)
    optim: Optim = group(Optim)


def nested(*words: str) -> Nested:
    return parse("train", Nested, words)


def test_groups_nest_on_the_command_line_and_in_yaml(tmp_path, capsys):
    want = Nested(steps=3, data=Data(train=("a", "b")), optim=Optim(lr=1e-5, betas=(0.9, 0.99)))
    words = ("--steps", "3", "--data.train", "a", "--data.train", "b", "--optim.lr=1e-5", "--optim.betas", "0.9,0.99")
    assert nested(*words) == want
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(want))
    assert "optim:\n  lr: 1.0e-05" in file.read_text()
    assert nested(str(file)) == want and nested(str(file), "--optim.lr", "2").optim.lr == 2
    assert "How weights change:\n  --optim.lr X" in help_text("train", Nested)


def test_refusals_of_groups(tmp_path):
    file = tmp_path / "run.yaml"
    for text, says in (
        ("data: {train: x}\noptim: {lrr: 1}", ": optim has no option 'lrr' (did you mean 'lr'?)"),
        ("data: {train: x}\noptimm: {lr: 1}", " has no option 'optimm' (did you mean 'optim'?)"),
        ("data: 3", ": data takes a mapping of option names to values, not 3"),
        ("data: {train: x}\noptim: {lr: fast}", ": optim: lr takes a number, not 'fast'"),
        ("steps: 1", "puna train needs --data.train: token data (see puna train --help)"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            nested(str(file))
        assert str(caught.value).endswith(says)
    with pytest.raises(UserError, match=r"has no option --optim.lrr \(did you mean '--optim.lr'\?\)"):
        nested("--data.train", "x", "--optim.lrr", "1")


@dataclass(kw_only=True)
class Wrapper:
    """Run another command."""

    command: tuple[str, ...] = argument("the command", default=(), rest=True)
    n: int = option(1, "how often")


def test_the_rest_is_taken_verbatim():
    got = parse("wrap", Wrapper, ["--n", "3", "train", "run.yaml", "--n", "4", "--help", "--mesh.tp=2"])
    assert got == Wrapper(n=3, command=("train", "run.yaml", "--n", "4", "--help", "--mesh.tp=2"))


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = option(0.0, "temperature", minimum=0)
    top_k: int = option(0, "candidates")
    stop: tuple[str, ...] = option((), "stop strings")
    hidden: bool = True


@dataclass(kw_only=True)
class Chat:
    """Talk."""

    verbose: bool = option(False, "more")
    sampling: dict = overrides(Sampling)


def test_overrides_hold_what_was_given(tmp_path):
    assert parse("chat", Chat, []).sampling == {}
    got = parse("chat", Chat, ["--temperature", "0", "--stop", "a", "--verbose"])
    assert got == Chat(verbose=True, sampling={"temperature": 0.0, "stop": ("a",)})
    file = tmp_path / "chat.yaml"
    file.write_text(to_yaml(got))
    assert (
        file.read_text() == "verbose: true\ntemperature: 0.0\nstop:\n- a\n" and parse("chat", Chat, [str(file)]) == got
    )
    with pytest.raises(UserError, match="puna chat has no option --hidden"):
        parse("chat", Chat, ["--hidden"])
    with pytest.raises(UserError, match="--temperature must be at least 0, not -1.0"):
        parse("chat", Chat, ["--temperature", "-1"])
    assert "How tokens are chosen:\n  --temperature X" in help_text("chat", Chat)


def test_a_group_may_have_defaults_of_its_own():
    @dataclass(kw_only=True)
    class Run:
        """A run."""

        optim: Optim = group(Optim, lr=0.5)

    assert parse("train", Run, []).optim == Optim(lr=0.5) and to_yaml(Run()) == ""
    assert parse("train", Run, ["--optim.betas", "0.1,0.2"]).optim == Optim(lr=0.5, betas=(0.1, 0.2))
    assert "learning rate (default: 0.5)" in help_text("train", Run)
