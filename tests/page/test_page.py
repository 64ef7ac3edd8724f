"""The page: what it says follows from the folder, and whatever stands there comes out as text."""

import dataclasses
import json
import math
import os
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.errors import UserError
from dpo_jax.page import evidence, panels, render, sections, summary, tables
from dpo_jax.page.answers import MOST, prompt_text
from dpo_jax.page.answers import table as answers_table
from dpo_jax.page.curves import COLUMNS, thin
from dpo_jax.page.drawing import Line, Plot, draw
from dpo_jax.page.folder import Curve, read
from dpo_jax.page.keeping import LEAST_SECONDS, SHARE, Page
from dpo_jax.page.render import write_comparison, write_page
from dpo_jax.page.texts import visible
from tests.support.run_folders import HOSTILE, make_run, settings

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Parsed(HTMLParser):
    """Tags, attributes and texts of a page, and whether its elements are nested as they ought to be."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def page(run):
    return Parsed(write_page(run).read_text())


def test_it_says_what_was_trained_on_what_and_what_came_of_it(page):
    text = page.text
    for said in (
        "tiny",
        "sigmoid, beta 0.1",
        "3,000 pairs of pairs.jsonl",
        "finished after 60 of 60 steps",
        "Better than where it started",
        "90.0% of 200 held-out pairs",
        "it answers 88 well, and 66 before (22 became good, 0 bad)",
        "1 alarm fired",
        "kl is large",
        "duplicate pair: 3",
        "data.eval heldout.jsonl null",
        "1.00 GiB",
        "vllm serve runs/made/model",
        "AutoModelForCausalLM.from_pretrained('runs/made/model')",
        "abababab",
        "8 x chip",
        "Drift from the reference",
        "Before training every margin was 0.",
    ):
        assert said in text, said


def test_it_is_one_file_without_scripts_that_asks_for_nothing(run, page):
    assert "script" not in {tag for tag, _ in page.tags}
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "action")]
    assert links and all(value.startswith("#") or value == "data:," for value in links)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    (policy,) = (attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "@import" not in (source := (run / "report.html").read_text()) and "url(http" not in source


def test_no_two_elements_have_an_id_in_common_and_every_reference_is_to_one(page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = {attrs["href"][1:] for _, attrs in page.tags if attrs.get("href", "").startswith("#")}
    used |= {attrs["clip-path"][5:-1] for _, attrs in page.tags if "clip-path" in attrs}
    assert used and used <= set(ids)


def test_figures_take_all_their_colours_from_the_page(page):
    source = render.resources.files("dpo_jax.page").joinpath("style.css").read_text()
    named = set(re.findall(r"--([\w-]+):", source))
    styles = " ".join(attrs["style"] for _, attrs in page.tags if "style" in attrs)
    assert not re.search(r"#[0-9a-f]{3,6}\b|rgb|DejaVu", styles)
    used = set(re.findall(r"var\(--([\w-]+)\)", styles))
    assert {"train", "held", "chosen", "rejected", "muted", "grid"} <= used <= named
    light, dark = (
        re.findall(r"--([\w-]+):", block) for block in source.split("@media (prefers-color-scheme: dark)")[:2]
    )
    assert sorted(light) == sorted(dark[: len(light)])


def test_the_same_folder_gives_the_same_page(run):
    before = (run / "report.html").read_bytes()
    assert write_page(run).read_bytes() == before


def test_whatever_stands_in_the_folder_is_text(tmp_path):
    folder = make_run(tmp_path / "a<b>&\u202e", text=HOSTILE, model={"path": HOSTILE.replace("\x00", "")})
    calm = Parsed(write_page(make_run(tmp_path / "calm")).read_text())
    text = write_page(folder).read_text()
    found = Parsed(text)
    assert [tag for tag, _ in found.tags if tag in ("script", "img")] == []
    assert sorted({tag for tag, _ in found.tags}) == sorted({tag for tag, _ in calm.tags})
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert "<script>alert(1)</script>" in found.text and "{{ 7*7 }} \\u202eevil\\x1b[2J\\x00" in found.text
    several = write_comparison([folder, tmp_path / "calm"], tmp_path / "c.html", names=[HOSTILE, "b"], title=HOSTILE)
    assert {tag for tag, _ in Parsed(several.read_text()).tags} <= {tag for tag, _ in calm.tags} | {"table"}


@given(st.text())
def test_no_letter_of_visible_text_is_a_control_and_printable_text_is_as_it_was(text):
    found = visible(text)
    found.encode("utf-8")
    assert all(c.isprintable() or c in "\n\u00a0\u200c\u200d" for c in found)
    assert not text.isprintable() or found == text


def test_secrets_and_folders_of_this_machine_stay_here(tmp_path):
    token = "hf_" + "a" * 30
    folder = make_run(tmp_path / "run", text=f"with {token}", data={"train": "/home/someone/secret/pairs.jsonl"})
    text = write_page(folder).read_text()
    assert token not in text and "/home/someone" not in text and "/secret/" not in text and str(tmp_path) not in text
    assert "pairs.jsonl" in text


# ---------------------------------------------------------------------------------------------- what is measured


@given(st.integers(1, 3000), st.integers(1, 9), st.sampled_from([0.0, 0.3, 0.99, 1.0]), st.integers(0, 2**32 - 1))
def test_a_thinned_curve_keeps_its_extremes_and_its_mean(count, stride, gone, seed):
    draw = np.random.default_rng(seed)
    values = np.where(draw.random(count) < gone, math.nan, draw.normal(size=count) ** 3)
    curve = Curve(stride * np.arange(count), values)
    found = thin(curve)
    assert len(found.steps) <= COLUMNS and (np.diff(found.steps) > 0).all()
    known = curve.values[np.isfinite(curve.values)]
    if len(known):
        assert (np.nanmin(found.low), np.nanmax(found.high)) == (known.min(), known.max())
        seen = np.isfinite(found.mean)
        slack = 1e-9 * np.abs(known).max()  # a mean of equals may be off by a rounding
        assert (found.low[seen] <= found.mean[seen] + slack).all() and (
            found.mean[seen] <= found.high[seen] + slack
        ).all()
    else:
        assert not np.isfinite(found.mean).any()


@pytest.mark.parametrize(
    ("accuracy", "after", "word"),
    [
        (0.9, "good", "Better"),
        (0.1, "bad", "Worse"),
        (0.52, "same", "No difference"),
        (0.9, "bad", "Mixed"),
    ],
)
def test_the_verdict_follows_from_what_is_sure(tmp_path, accuracy, after, word):
    folder = make_run(tmp_path / "run")
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    last = {**json.loads(rows[-1]), "eval_rewards/accuracies": accuracy, "eval_rewards/margins": accuracy - 0.5}
    (folder / "metrics.jsonl").write_text("\n".join([*rows[:-1], json.dumps(last)]) + "\n")
    first = [json.loads(line) for line in (folder / "answers" / "0.jsonl").read_text().splitlines()]
    rows = [{**row, "good": {"good": True, "bad": False, "same": row["good"]}[after]} for row in first]
    (folder / "answers" / "60.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read(folder)
    assert evidence.verdict(summary.evidence(run), finished=True)[0].startswith(word)


def held_out(folder, objective, before, after, rewards=()):
    """A run with this objective, whose evaluations have these metrics, and two files of rewards."""
    make_run(folder, objective={"name": objective}, evaluation={})
    for name in ("notes.jsonl", "answers/0.jsonl", "answers/60.jsonl", "evaluations/0.npz", "evaluations/60.npz"):
        (folder / name).unlink()
    rows = [{"step": step, **{f"eval_{k}": v for k, v in found.items()}} for step, found in ((0, before), (60, after))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, (chosen, rejected) in zip((0, 60), rewards, strict=False):
        np.savez(folder / "evaluations" / f"{step}.npz", chosen=np.array(chosen), rejected=np.array(rejected))
    return folder


TOLD = {"rewards/accuracies": 0.0, "rewards/margins": 0.0, "loss": 0.6931}
NAN, KINDS = math.nan, np.arange(12) % 2 == 0
UP = np.where(KINDS, 1.0, NAN), np.where(KINDS, NAN, 1.0)  # six are desirable; all became more likely
APART = np.where(KINDS, 1.0, NAN), np.where(KINDS, NAN, -1.0)
ALL_GOOD = np.array([1.0] * 5 + [-1.0]), np.full(6, NAN)
CASES = {
    "sft": ("sft", {"loss": 0.878}, {"loss": 0.8499}, (), "Better", "held-out loss fell from 0.8780 to 0.8499"),
    "sft, worse": ("sft", {"loss": 0.8}, {"loss": 0.9}, (), "Worse", "held-out loss rose from 0.8000 to 0.9000"),
    "sft, the same": ("sft", {"loss": 0.8}, {"loss": 0.801}, (), "No difference", "held-out loss hardly changed"),
    "reward": (
        "reward",
        TOLD,
        {"rewards/accuracies": 0.9, "rewards/margins": 1.0},
        [(np.zeros(40), np.zeros(40)), (np.ones(40), np.zeros(40))],
        "Better",
        "greater reward in 90.0% of 40 held-out pairs (95 % interval 76.9% to 96.0%)",
    ),
    "simpo": (
        "simpo",
        {"rewards/accuracies": 0.5, "rewards/margins": 0.1},
        {"rewards/accuracies": 1.0, "rewards/margins": 0.2},
        [(KINDS * 1.0, np.full(12, 0.5)), (np.ones(12), np.full(12, 0.5))],
        "Better",
        "greater reward in 12 of 12 held-out pairs, and had it in 6 before (6 became so, 0 are so no more)",
    ),
    "kto": (
        "kto",
        TOLD,
        {"rewards/accuracies": 0.9, "drift/chosen": 1.0},
        [(0 * APART[0], 0 * APART[1]), APART],
        "Better",
        "of 12 held-out single answers, 6 of 6 desirable ones became more likely and 6 of 6 undesirable ones became",
    ),
    "kto, all more likely": (
        "kto",
        TOLD,
        {"rewards/accuracies": 0.9, "drift/chosen": 1.0},
        [(0 * UP[0], 0 * UP[1]), UP],
        "No difference",
        "6 of 6 desirable ones became more likely and 0 of 6 undesirable ones became less likely",
    ),
    "kto, one kind": (
        "kto",
        {"loss": 0.5},
        {"loss": 0.4, "drift/chosen": 1.0},
        [(0 * ALL_GOOD[0], ALL_GOOD[1]), ALL_GOOD],
        "Not known: what was measured twice does not tell",
        "of 6 held-out single answers, 5 of 6 desirable ones became more likely; there are no undesirable ones to",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_objective_has_evidence_of_its_own(tmp_path, name):
    objective, before, after, rewards, word, words = CASES[name]
    text = Parsed(write_page(held_out(tmp_path / "run", objective, before, after, rewards)).read_text()).text
    assert words in text and word in text and "nothing held-out was" not in text
    assert ("pairs" not in text.partition("Settings")[0].replace("pairs.jsonl", "")) == (objective in ("sft", "kto"))


GAINED = {"rewards/accuracies": 0.9, "rewards/margins": 0.2, "drift/chosen": 1.0, "loss": 0.69}


@pytest.mark.parametrize(
    ("changes", "word", "words"),
    [
        ({}, "Better than where it started", "90.0% of 40"),
        ({"loss": 0.75}, "Mixed", "the held-out loss rose from 0.6931 to 0.7500"),
        ({"rewards/margins": -0.02}, "Mixed", "but the mean held-out margin is -0.02: a few answers moved far"),
        ({"rewards/accuracies": 0.1}, "Mixed", "but the mean held-out margin is +0.2"),
    ],
)
def test_what_speaks_against_the_count_of_pairs_is_not_left_out(tmp_path, changes, word, words):
    """Overfitted runs have a rising loss beside a rising accuracy; that was called better, and nothing else."""
    rewards = [(np.zeros(40), np.zeros(40)), (np.ones(40), np.zeros(40))]
    run = read(held_out(tmp_path / "run", "sigmoid", TOLD, GAINED | changes, rewards))
    found = summary.evidence(run)
    assert evidence.verdict(found, finished=True)[0].startswith(word) and words in " ".join(one.text for one in found)


@pytest.mark.parametrize(
    ("values", "word", "words"),
    [
        ((0.5, 0.4), "Better than where it started", "eval_loss, which chose step 60, went from 0.5 to 0.4"),
        ((0.5, 0.5), "Better than where it started, but not by eval_loss", "no step was better than the start"),
        (
            (0.5, 0.5002),
            "Mixed",
            "by eval_loss, which chose step 60, no step was better than the start (0.5, then 0.5002)",
        ),
    ],
)
def test_the_metric_that_chose_the_step_has_a_say(tmp_path, values, word, words):
    rewards = [(np.zeros(40), np.zeros(40)), (np.ones(40), np.zeros(40))]
    before, after = (given | {"loss": value} for given, value in zip((TOLD, GAINED), values, strict=True))
    run = read(held_out(tmp_path / "run", "sigmoid", before, after, rewards))
    best = {"metric": "eval_loss", "step": 60, "value": values[1]}
    found = summary.evidence(dataclasses.replace(run, known={**run.known, "best": best}))
    assert evidence.verdict(found, finished=True)[0].startswith(word) and words in " ".join(one.text for one in found)


def test_what_is_wrong_with_the_data_stands_on_the_page(run, tmp_path):
    data = read(run).data
    told = {
        "shared": ["data.eval: 10 of 10 prompts are also in data.train"],
        "warnings": ["data.train: <b> 8 are texts"],
    }
    folder = make_run(tmp_path / "run")
    (folder / "data.json").write_text(json.dumps({**data, **told}))
    text = Parsed(write_page(folder).read_text()).text
    assert "Better than where it started, on prompts of which it was trained on some" in text
    assert text.count("10 of 10 prompts are also in data.train") == 2  # beside the verdict, and with the data
    assert text.count("data.train: <b> 8 are texts") == 1
    (folder / "data.json").write_text(json.dumps({**data, "shared": 3, "warnings": [None]}))
    assert "prompts are also" not in Parsed(write_page(folder).read_text()).text


def test_a_step_is_called_not_finite_where_its_loss_or_its_gradient_was_not(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [{"step": step, "loss": 0.5, "grad_norm": 1.0, "kl": None, "nonfinite": True} for step in range(1, 9)]
    rows[4] |= {"grad_norm": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "1 recorded step was not finite: 5" in Parsed(write_page(folder).read_text()).text


def test_what_was_measured_twice_and_tells_nothing_is_not_called_unmeasured(tmp_path):
    moving = {"reference": {"update_every": 2, "mode": "live"}}
    run = read(held_out(tmp_path / "run", "sigmoid", {"loss": 0.7}, {"loss": 0.6}))
    assert [one.says for one in summary.evidence(run)] == [1]
    run = dataclasses.replace(run, known={**run.known, "settings": {**run.settings, **moving}})
    assert summary.evidence(run) == [] and all(summary.measured(run))
    assert evidence.verdict([], finished=True, measured=True)[0] == "Not known: what was measured twice does not tell"


def test_an_alarm_stands_beside_the_verdict(page):
    good = [evidence.Evidence(1, "it is")]
    alarms = [
        (9, "step 9: kl is 560 nats per token: the policy has left; lower it"),
        (11, "step 11: grad_norm is exactly 0: nothing"),
    ]
    text, colour = evidence.verdict(good, finished=True, alarms=alarms[:1])
    assert (text, colour) == (
        "Better than where it started by these measures, but an alarm fired: kl is 560 nats per token",
        "mixed",
    )
    assert "2 alarms fired, the first: kl is 560" in evidence.verdict(good, finished=True, alarms=alarms)[0]
    assert evidence.verdict([], finished=True, alarms=alarms)[1] == "unknown"
    assert evidence.verdict(good, finished=True) == ("Better than where it started", "good")
    assert "by these measures, but an alarm fired: kl is large" in page.text


def test_a_histogram_leaves_out_a_kind_of_answer_that_there_is_none_of(tmp_path):
    folder = held_out(tmp_path / "run", "kto", {"loss": 0.5}, {"loss": 0.4}, [(0 * ALL_GOOD[0], ALL_GOOD[1]), ALL_GOOD])
    (plot,) = panels.histograms(read(folder).rewards)  # a mean of nothing would be a warning, which is an error here
    assert [part.label for part in plot.parts] == ["chosen"]


def test_a_sample_of_answers_is_not_only_of_gains(run):
    found = answers_table(read(run))
    assert found is not None and len(found.rows) == MOST and found.total == 100
    assert {row.change for row in found.rows} == {"gained", ""} and found.gained == 22
    assert found.heads == ["before", "after step 60"]
    assert prompt_text([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]) == (
        "system: Be kind.\nuser: Hi"
    )


def test_answers_have_what_a_judge_said_of_them(run, tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "verdicts").mkdir()
    rows = [{"outcome": (1.0, 0.5, 0.0, None)[i % 4], "reason": f"because {i}"} for i in range(100)]
    (folder / "verdicts" / "60.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = answers_table(read(folder))
    said = {int(row.prompt.split()[1]): row.judged for row in found.rows}
    words = ("better than before", "neither is better", "worse than before")
    assert all(said[i] == ([f"judge: {words[i % 4]}: because {i}"] if i % 4 < 3 else []) for i in said)
    assert {i % 4 for i in said} == {0, 1, 2, 3}
    assert "judge: worse than before: because" in Parsed(write_page(folder).read_text()).text
    (folder / "verdicts" / "reward").mkdir()
    (folder / "verdicts" / "reward" / "60.jsonl").write_text(
        "".join([json.dumps({"outcome": 1.0, "reason": ""}) + "\n"] * 100)
    )
    found = answers_table(read(folder))
    assert all(row.judged[-1] == "judge (reward): better than before" for row in found.rows)


def test_every_judge_has_a_row_a_figure_and_a_sentence(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if any(name.startswith("eval_") for name in row):
            won = row["step"] / 100
            for label, rate in (("", won), ("/reward", 1 - won)):
                ends = {"": rate, "_low": rate - 0.05, "_high": rate + 0.05}
                row |= {f"eval_win_rate{end}{label}": value for end, value in ends.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(folder)
    after = {label: new for label, _, new in summary.results(found)}
    assert after["win rate over start (first judge)"] == "60.0%" and after["win rate over start (reward)"] == "40.0%"
    plots = {plot.title: plot.parts[0] for plot in panels.plots(found)}
    assert plots["Win rate"].curve.mean[-1] == 0.6 and plots["Win rate by the reward judge"].curve.mean[-1] == 0.4
    assert plots["Win rate by the reward judge"].band is not None
    said = {one.text.split(" (")[0]: one.says for one in summary.evidence(found) if "contests" in one.text}
    assert said == {
        "it wins 60.0% of its contests against the start, by the first judge": 1,
        "it wins 40.0% of its contests against the start, by the reward judge": -1,
    }


def test_held_out_sets_that_have_names_have_curves_of_their_own(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in [name for name in row if name.startswith("eval_")]:
            value = row.pop(name)
            row |= {f"eval/{which}/{name[5:]}": value for which in ("helpful", "harmless")}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(folder)
    assert found.sets == ["helpful", "harmless"]
    loss = next(plot for plot in panels.plots(found) if plot.title == "Loss")
    assert [part.label for part in loss.parts] == ["training", "helpful", "harmless"]
    assert len({part.colour for part in loss.parts}) == 3
    assert [label for label, _, _ in summary.results(found)].count("helpful: loss") == 1


@pytest.mark.parametrize("values", [[math.nan], [1.0], [0.0, 0.0], [1e-30, 1e30], [math.nan, 2.0]])
def test_no_curve_is_too_odd_to_be_drawn(values):
    curve = thin(Curve(np.arange(len(values)), np.array(values)))
    plots = [Plot("t", "u", (Line(curve, "train", marked),), (0.5,)) for marked in (False, True)]
    assert all(draw(plot, 1).startswith("<svg") for plot in plots)


# ---------------------------------------------------------------------------------------------- odd folders


def test_a_run_that_has_just_begun_has_a_page_without_figures(tmp_path):
    folder = make_run(tmp_path / "run", finished=False)
    for name in ("metrics.jsonl", "notes.jsonl", "answers/0.jsonl", "answers/60.jsonl"):
        (folder / name).unlink()
    text = Parsed(write_page(folder).read_text()).text
    assert "going on, 0 of 60 steps are made" in text and "Not known: nothing held-out was measured twice yet" in text


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "data.json", "answers/60.jsonl", "evaluations/60.npz"])
def test_a_damaged_file_costs_its_part_of_the_page_and_is_named(tmp_path, name):
    folder = make_run(tmp_path / "run", steps=60)
    for content in (b"{\n", b"\xff\x00\n" * 40, b"[" * 100_000 + b"\n"):
        (folder / name).write_bytes(content)
        assert [line for line in read(folder).damaged if line.startswith(f"{name} cannot be read: ")]
    text = Parsed(write_page(folder).read_text()).text
    assert f"{name} cannot be read: " in text and "Use it" in text


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "data.json", "answers/60.jsonl", "notes.jsonl"])
@pytest.mark.parametrize(
    "value", [[], {}, {"step": 3, "settings": [], "facts": 1, "data.train": 7, "answer": {}, "good": "x"}]
)
def test_no_json_where_other_json_belongs_is_fatal(tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(render, "draw", lambda plot, number: "<svg></svg>")  # what is drawn is numbers
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(json.dumps(value) + "\n")
    assert "</html>" in write_page(folder).read_text()


def test_settings_of_another_version_are_shown_as_they_are(tmp_path):
    folder = make_run(tmp_path / "run")
    known = json.loads((folder / "run.json").read_text())
    known["settings"] |= {"objective": {"name": "made_up", "warmth": 3}, "novelty": {"level": 11}}
    (folder / "run.json").write_text(json.dumps(known))
    assert "novelty.level" in write_page(folder).read_text()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run .*; name the output of a run"):
        write_page(tmp_path)


def test_settings_that_differ_are_those_that_were_given():
    found = sections.config.differing(
        settings(optimizer={"learning_rate": 1e-5}, objective={"name": "simpo", "beta": 2.0})
    )
    assert {key for key, (_, usual) in found.items() if usual is not ...} == {
        "data.eval",
        "evaluation.answers",
        "objective.name",
        "objective.beta",
        "optimizer.learning_rate",
    } - ({"objective.beta"} if found.get("objective.beta") is None else set())
    assert found["optimizer.learning_rate"] == (1e-5, 5e-7) and found["model.path"][1] is ...


def test_a_long_run_is_drawn_soon_and_small(tmp_path):
    folder = make_run(tmp_path / "run", steps=10_000, every=100)
    page = render.page_of(read(folder))  # what is imported once is no part of it
    began = time.process_time()
    write_page(folder)
    seconds, size = time.process_time() - began, os.path.getsize(folder / "report.html")
    assert seconds <= 5 and size <= 3_000_000, (seconds, size)
    assert size == len(page.encode())


# ---------------------------------------------------------------------------------------------- several runs


def test_a_comparison_has_each_metric_of_all_runs_in_one_figure(tmp_path):
    folders = [make_run(tmp_path / name, objective={"beta": beta}) for name, beta in (("a", 0.1), ("b", 0.3))]
    found = Parsed(
        write_comparison(folders, tmp_path / "c.html", title="A sweep", names=["first", "second"]).read_text()
    )
    assert "objective.beta 0.1 0.3" in found.text and "model.path" not in found.text.partition("Last values")[0]
    assert found.text.count("A sweep") == 2 and "Loss, held-out mean of the pairs" in found.text
    loss = next(plot for plot in panels.compared([read(f) for f in folders], ["first", "second"]))
    assert [part.label for part in loss.parts] == ["first", "second"]
    assert len({part.colour for part in loss.parts}) == 2


@pytest.mark.parametrize(("beta", "marked"), [(0.1, True), (0.3, False)])
def test_losses_and_margins_have_a_best_only_among_runs_with_one_objective(tmp_path, beta, marked):
    """A loss, or a margin, of another beta has another unit; a share of pairs has none."""
    folders = [make_run(tmp_path / "a", objective={"beta": 0.1}), make_run(tmp_path / "b", objective={"beta": beta})]
    file = folders[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v * 0.9 if "eval" in k else v for k, v in r.items()}) + "\n" for r in rows))
    lines = {name: cells for name, *cells in tables.metrics([read(folder) for folder in folders], ["a", "b"]).rows}
    best = {name: any(cell.best for cell in cells) for name, cells in lines.items()}
    assert best["held-out loss"] == best["held-out rewards/margins"] == marked
    assert best["held-out rewards/accuracies"] and best["held-out pass_rate"]


def test_runs_of_different_objectives_have_their_effective_settings_and_what_cannot_be_compared_is_said(tmp_path):
    """Beta and gamma are told also where they are the objective's defaults; what is off is not told."""
    folders = [make_run(tmp_path / name, objective={"name": name}) for name in ("ipo", "simpo", "kto")]
    runs = [read(folder) for folder in folders]
    shown = {name: [cell.text for cell in cells] for name, *cells in tables.settings(runs[:2], ["a", "b"]).rows}
    assert shown == {
        "objective.name": ["ipo", "simpo"],
        "objective.beta": ["0.1", "2.0"],
        "objective.gamma": ["-", "1.0"],
    }
    others = {name for name, *_ in tables.settings(runs, ["a", "b", "c"]).rows} - set(shown)
    assert others == {"objective.desirable_weight", "objective.undesirable_weight"}
    assert tables.metrics(runs[:2], ["a", "b"]).note == tables.OTHER_UNITS
    assert tables.metrics(runs, ["a", "b", "c"]).note == f"{tables.OTHER_UNITS} {tables.OTHER_SHARES}"
    assert tables.metrics(runs[:1] * 2, ["a", "b"]).note == ""
    several = Parsed(write_comparison(folders[:2], tmp_path / "c.html").read_text())
    assert tables.OTHER_UNITS in several.text and tables.OTHER_SHARES not in several.text


def test_accuracies_have_a_best_only_among_runs_of_the_same_kind(tmp_path):
    """Of single answers it is the share on the right side of a baseline."""
    folders = [make_run(tmp_path / name, objective={"name": name}) for name in ("ipo", "simpo", "kto")]
    file = folders[0] / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v * 0.9 if "eval" in k else v for k, v in r.items()}) + "\n" for r in rows))
    for count, marked in ((2, True), (3, False)):
        table = tables.metrics([read(folder) for folder in folders[:count]], list("abc"[:count]))
        lines = {name: any(cell.best for cell in cells) for name, *cells in table.rows}
        assert lines["held-out rewards/accuracies"] == marked and lines["held-out pass_rate"]


def test_runs_of_the_same_name_are_told_apart_and_many_have_lines_of_their_own(tmp_path):
    folders = [make_run(tmp_path / f"r{i}" / "run") for i in range(20)]
    runs = [read(folder) for folder in folders]
    names = render._told_apart(runs)
    assert len(set(names)) == 20
    loss = next(plot for plot in panels.compared(runs, names))
    assert len({(part.colour, part.dash % 3) for part in loss.parts}) == 20


def test_a_comparison_never_replaces_a_file_that_is_none(tmp_path):
    folder = make_run(tmp_path / "run")
    (tmp_path / "thesis.html").write_text("<p>mine</p>")
    with pytest.raises(UserError, match=r"thesis\.html: is there and no page"):
        write_comparison([folder], tmp_path / "thesis.html")
    again = write_comparison([folder], tmp_path / "c.html")
    assert write_comparison([folder], again) == again


# ---------------------------------------------------------------------------------------------- while a run goes on


def test_it_is_drawn_now_and_then_and_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now, drawn = [0.0], []

    def slowly(folder):
        drawn.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr("dpo_jax.page.keeping.write_page", slowly)
    page = Page(tmp_path, clock=lambda: now[0])
    for _ in range(5000):
        page.refresh(print)
        now[0] += 1.0
    assert drawn[0] == 0 and np.diff(drawn).min() >= max(LEAST_SECONDS, 2.0 / SHARE)
    assert 2 * len(drawn) <= SHARE * now[0] + 2
    page.end(print)
    assert drawn[-1] == now[0] - 2


def test_a_page_that_cannot_be_drawn_is_said_once_and_stops_nothing(tmp_path):
    said, now = [], [0.0]
    page = Page(tmp_path / "gone", clock=lambda: now[0])
    for _ in range(3):
        page.refresh(said.append)
        now[0] += 1000
    page.end(said.append)
    assert len(said) == 1 and said[0].startswith("report.html could not be drawn (UserError: ")
