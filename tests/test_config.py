"""The recipe: what is read, what is refused, and how it is said."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from potstill import config
from potstill.errors import RecipeError
from potstill.jobs import Job, jobs, updates

ROOT = Path(__file__).parents[1]
SHIPPED = [*sorted((ROOT / "recipes").glob("*.yaml")), ROOT / "src" / "potstill" / "demo.yaml"]

FULL = """
name: full
seed: 3
seeds: [5, 6]
data: {kind: folder, path: /images, mode: L, size: 8}
train:
  model: {kind: lvae, image: [1, 8, 8], width: 4, levels: 2, latent: 2}
  steps: 6
  lr: 1e-3
teacher: {kind: trained}
student: {ratio: 4}
surrogate: {n: 64}
distill:
  generate: {rules: [{nodes: "z*", by: wasserstein2, weight: 5e-1}, {nodes: out}], clip: 1, ema: .9}
  infer: null
arms: [data_free, {kind: with_data, name: mine, replay: "z*"}, scratch]
evaluate: {features: "python:mine:network", n: 64}
report: {images: 4}
compute: {threads: 1, workers: 2}
"""


def read(tmp_path, text, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return config.read(path, overrides)


def problems(tmp_path, text, *overrides):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text, *overrides)
    return str(caught.value).splitlines()


# ------------------------------------------------------------------ what is read


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_recipe_is_valid(path):
    recipe = config.read(path)
    assert config.check(yaml.safe_load(config.dump(recipe))) == recipe


def test_there_are_shipped_recipes():
    assert len(SHIPPED) >= 3
    assert all(path.is_file() for path in SHIPPED)


def test_everything_is_read(tmp_path):
    recipe = read(tmp_path, FULL)
    assert recipe.train is not None
    assert recipe.train.lr == 0.001
    assert isinstance(recipe.data, config.FileData)
    assert isinstance(recipe.train.model, config.LVAENet)
    assert isinstance(recipe.teacher, config.Trained)
    assert recipe.distill is not None
    assert recipe.distill.infer is None
    assert [rule.weight for rule in recipe.distill.generate.rules] == [0.5, 1.0]
    assert recipe.distill.generate.ema == 0.9
    assert [arm.title for arm in recipe.arms] == ["student_data_free", "mine", "student_scratch"]
    assert recipe.arms[1].replay == "z*"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E3", 1e3), ("1.e2", 1e2), (".5", 0.5), ("+2", 2.0), ("2.5e+1", 25.0), ("010", 10.0)],
)
def test_a_number_is_a_number_in_files_and_overrides(tmp_path, text, value):
    line = f"distill: {{generate: {{lr: {text}}}}}\nteacher: {{kind: pretrained, path: x}}\nstudent: {{width: 3}}\nsurrogate: {{}}"
    for recipe in (read(tmp_path, f"name: a\n{line}"), read(tmp_path, FULL, f"distill.generate.lr={text}")):
        assert recipe.distill is not None
        assert recipe.distill.generate.lr == value


@pytest.mark.parametrize("text", ["on", "yes", "no", "Off", "y", "2001-01-01", "1_000", "1:30", "0x1F", "=", "null.x", "1e3e3"])
def test_what_yaml_1_2_takes_for_text_stays_text(tmp_path, text):
    recipe = read(tmp_path, f"name: a\nteacher: {{kind: pretrained, path: {text}}}")
    assert isinstance(recipe.teacher, config.Pretrained)
    assert recipe.teacher.path == text


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("data: {kind: digits}", config.DigitsData),
        ("data: {kind: npz, path: x}", config.FileData),
        ("data: {kind: parquet, path: x}", config.FileData),
        ("teacher: {kind: pretrained, path: x}", config.Pretrained),
        ("teacher: {kind: weights, path: x, net: {kind: vae, image: [3, 32, 32]}}", config.Weights),
        ("teacher: {kind: weights, path: x, net: {kind: resnet, image: [3, 32, 32], classes: 10, mean: [.5, .5, .5]}}", config.Weights),
        ("teacher: {kind: python, target: 'a.b:c', arguments: {n: [1, null, {x: 1.5}]}}", config.Python),
    ],
)
def test_a_union_is_told_by_its_kind(tmp_path, section, kind):
    recipe = read(tmp_path, f"name: a\n{section}")
    assert isinstance(getattr(recipe, section.partition(":")[0]), kind)


def test_a_byte_order_mark_is_no_part_of_it(tmp_path):
    assert read(tmp_path, "\ufeffname: a").name == "a"


# ------------------------------------------------------------------ what is refused


def test_all_errors_come_at_once_each_with_its_path(tmp_path):
    text = """
name: a
seed: -1
data: {kind: digits, train: 9999}
train:
  lr: fast
  steps: 1.5
  batch: 1
  modl: 1
  model: {kind: vae, image: [1, 8]}
distill: {generate: {rules: [{by: kl}, {by: emd}]}}
compute: {device: gpu, threads: true}
"""
    found = {line.partition(": ")[0]: line for line in problems(tmp_path, text)}
    assert set(found) == {
        "seed",
        "data.train",
        "train.lr",
        "train.steps",
        "train.batch",
        "train.modl",
        "train.model.image.2",
        "distill.generate.rules.1.by",
        "compute.device",
        "compute.threads",
    }
    assert found["train.lr"] == "train.lr: a number is expected (found 'fast')"
    assert found["seed"] == "seed: input should be greater than or equal to 0 (found -1)"
    assert "'cpu', 'cuda' or 'mps' (found 'gpu')" in found["compute.device"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("studnet: {width: 3}", "studnet: unknown key; did you mean student?"),
        ("student: {widht: 3}", "student.widht: unknown key; did you mean width?"),
        ("distill: {generate: {step: 3}}", "distill.generate.step: unknown key; did you mean steps?"),
        ("distill: {generate: {rules: [{node: z}]}}", "distill.generate.rules.0.node: unknown key; did you mean nodes?"),
        ("teacher: {kind: pretrained, pth: x, path: x}", "teacher.pth: unknown key; did you mean path?"),
        (
            "teacher: {kind: weights, path: x, net: {kind: vae, image: [1, 8, 8], latnet: 3}}",
            "teacher.net.latnet: unknown key; did you mean latent?",
        ),
        (
            "train: {model: {kind: resnet, image: [1, 8, 8], classes: 3, dept: 20}}",
            "train.model.dept: unknown key; did you mean depth?",
        ),
        ("train: {model: {kind: vae, image: [1, 8, 8]}, augment: {shft: 2}}", "train.augment.shft: unknown key; did you mean shift?"),
        ("data: {kind: folder, path: x, python: 3}", "data.python: unknown key"),
        ("python: 3", "python: unknown key"),
        ("weights: 3", "weights: unknown key"),
    ],
)
def test_an_unknown_key_is_named_and_the_nearest_suggested(tmp_path, text, expected):
    (found,) = [line for line in problems(tmp_path, f"name: a\n{text}") if "unknown key" in line]
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("surrogate: {kind: guided, prior: x, observe: sample}", "surrogate.observe: is of kind ancestral, and here kind is guided"),
        ("surrogate: {prior: x}", "surrogate.prior: is of kind guided, and here kind is ancestral"),
        (
            "surrogates: {a: {kind: uniform, steps: 3}}",
            "surrogates.a.steps: is of kind inversion or latent or guided, and here kind is uniform",
        ),
        ("data: {kind: digits, path: x}", "data.path: is of kind folder or parquet or npz or values, and here kind is digits"),
        (
            "train: {model: {kind: vae, image: [1, 8, 8], levels: 3}}",
            "train.model.levels: is of kind lvae, and here kind is vae",
        ),
    ],
)
def test_a_key_of_another_kind_names_those_that_have_it(tmp_path, text, expected):
    (found,) = [line for line in problems(tmp_path, f"name: a\n{text}") if "is of kind" in line]
    assert found == f"{expected}; remove it, or change kind"


@pytest.mark.parametrize("text", ["arms: [datafree]", "seeds: [x]"])
def test_a_list_whose_item_is_wrong_is_not_told_to_be_empty(tmp_path, text):
    (found,) = problems(tmp_path, f"name: a\n{text}")
    assert found.startswith(f"{text.partition(':')[0]}.0")


@pytest.mark.parametrize("key", ["arms", "seeds"])
def test_an_empty_list(tmp_path, key):
    assert problems(tmp_path, f"name: a\n{key}: []") == [f"{key}: a list should have at least 1 item after validation, not 0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "data: {kind: fodler, path: x}",
            "data.kind: one of digits, glyphs, folder, parquet, npz, values, old_faithful, strokes is expected (found 'fodler'); "
            "did you mean folder?",
        ),
        ("data: {path: x}", "data: its kind is missing"),
        ("surrogate: 3", "surrogate: a mapping is expected"),
        (
            "surrogate: {kind: gided}",
            "surrogate.kind: one of ancestral, uniform, inversion, latent, guided is expected (found 'gided'); did you mean guided?",
        ),
        ("surrogates: {a: {kind: latnt}}", "surrogates.a.kind: one of ancestral, uniform, inversion, latent, guided is expected (found 'l"),
        ("surrogate: {kind: [1]}", "surrogate.kind: one of ancestral, uniform, inversion, latent, guided is expected (found [1])"),
        (
            "teacher: {kind: weights, path: x, net: {kind: lvea}}",
            "teacher.net.kind: one of lvae, vae, gan, classifier, resnet, unet, helmholtz, vrnn, text_to_image is expected (found 'lvea'); "
            "did you mean lvae?",
        ),
        (
            "arms: [with_dta]",
            "arms.0.kind: input should be 'data_free', 'with_data', 'scratch' or 'continual' (found 'with_dta'); did you mean with_data?",
        ),
        (
            "compute: {device: gpu}",
            "compute.device: input should be 'auto', 'cpu', 'cuda' or 'mps' (found 'gpu')",
        ),
        ("data: {kind: folder}", "data.path: field required"),
        ("data: {kind: folder, path: ''}", "data.path: string should have at least 1 character"),
        ('data: {kind: folder, path: "a\\0b"}', "data.path: a line of printable characters is expected (found 'a\\x00b')"),
        ("teacher: zoo", "teacher: a mapping is expected (found 'zoo')"),
        ("seeds: 3", "seeds: a list is expected (found 3)"),
        ("arms: {}", "arms: a list is expected"),
        ("compute: [1]", "compute: a mapping is expected"),
        ("student: {}", "student: give exactly one of width, ratio, budget, target, net and start; found none"),
        ("student: {width: 3, ratio: 2}", "student: give exactly one of width, ratio, budget, target, net and start; found width, ratio"),
        ("student: {budget: {}}", "student.budget: give exactly one of params, mib and ms; found none"),
        ("student: {budget: {mib: 1, ms: 2}}", "student.budget: give exactly one of params, mib and ms; found mib, ms"),
        ("student: {budget: {ms: 0}}", "student.budget.ms: input should be greater than 0"),
        ("student: {width: 3, arguments: {a: 1}}", "student: arguments go with target"),
        ("student: {width: '3'}", "student.width: a number is expected (found '3')"),
        ("student: {width: 99999999999}", "student.width: input should be less than"),
        ("teacher: {kind: python, target: 'os.system'}", "teacher.target: write module:function, such as mine:teacher (found 'os.system')"),
        ("teacher: {kind: python, target: 'a:b', arguments: {x: .inf}}", "teacher.arguments: a finite number is expected, found inf"),
        ("teacher: {kind: python, target: 'a:b', arguments: {1: 2}}", "teacher.arguments.1.[key]: input should be a valid string"),
        ("teacher: {kind: python, target: 'a:b', arguments: {x: {1: 2}}}", "teacher.arguments: names are expected as keys, found 1"),
        (
            "teacher: {kind: trained}\nsurrogate: {energy: [{kind: l2, nodes: z1}]}",
            "surrogate.energy.0: nodes goes with kind posterior_kl",
        ),
        ("surrogate: {energy: [{kind: posterior_kl, n: 9}]}", "surrogate.energy.0: n goes with kind typicality"),
        ("distill: {generate: {energy: [{kind: disagreement}]}}", "distill.generate.energy: disagreement compares with a student"),
        ("distill: {generate: {energy: [{kind: l2}, {kind: l2}]}}", "distill.generate.energy: two are the same: l2, l2"),
        ("seeds: []", "seeds: a list should have at least 1 item"),
        ("seeds: [1, 1]", "seeds: two are the same: 1, 1"),
        ("arms: []", "arms: a list should have at least 1 item"),
        ("arms: [data_free, data_free]", "arms: two are the same: student_data_free, student_data_free"),
        ("arms: [{kind: data_free, name: teacher}]", "arms.0: an arm cannot be named teacher"),
        ("arms: [{kind: scratch, replay: z}]", "arms.0: replay is of distilled arms; a scratch arm has one phase of its own"),
        ("arms: [{kind: data_free, name: a/b}]", "arms.0.name: a name of letters, digits, dots, hyphens and underscores is expected"),
        ("seed: 1.5", "seed: input should be a valid integer"),
        ("seed: .nan", "seed: input should be a finite number"),
        ("seed: 9223372036854775808", "seed: input should be less than"),
        ("train: {lr: .inf, model: {kind: vae, image: [1, 8, 8]}}", "train.lr: input should be a finite number"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path, text, expected):
    assert any(line.startswith(expected) for line in problems(tmp_path, f"name: a\n{text}")), problems(tmp_path, f"name: a\n{text}")


NETWORK = "train: {model: {kind: vae, image: [1, 8, 8]}}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NETWORK, ["train: needs data"]),
        ("teacher: {kind: trained}", ["teacher: kind trained needs a train section"]),
        (
            "data: {kind: digits}\nteacher: {kind: trained}\ntrain: {model: {kind: resnet, image: [1, 8, 8], classes: 10}}\n"
            "student: {width: 1}\ndistill: {infer: null}",
            ["distill.generate: train.model is a classifier, which does not generate; set generate: null"],
        ),
        (
            "teacher: {kind: pretrained, path: x}\nstudent: {width: 1}\ndistill: {generate: null}",
            ["distill.infer: trains on surrogate images and needs a surrogate section"],
        ),
        (
            "teacher: {kind: pretrained, path: x}\nstudent: {width: 1}\ndistill: {generate: null, infer: null}\nsurrogate: {}",
            ["arm student_data_free: without generate and infer it has no phase"],
        ),
        (
            "teacher: {kind: pretrained, path: x}\nstudent: {width: 1}\ndistill: {generate: null}\nsurrogate: {}\n"
            "arms: [{kind: data_free, infer: false}, {kind: data_free, name: mine, share: z}]",
            [
                "arm student_data_free: without generate and infer it has no phase",
                "arm mine: replay, share, start and adversarial are of the phase generate, which is null",
            ],
        ),
        ("surrogate: {}", ["surrogate: needs a teacher"]),
        (
            "distill: {}",
            [
                "distill: needs a teacher",
                "distill: needs a student",
                "distill.infer: trains on surrogate images and needs a surrogate section, or infer: null",
            ],
        ),
        (
            "distill: {infer: null}\nteacher: {kind: pretrained, path: x}\nstudent: {width: 1}\narms: [scratch]",
            ["arms: with_data, scratch and continual need data"],
        ),
        (
            "evaluate: {}",
            [
                "evaluate: needs distill",
                "evaluate: needs data to compare with; reference: teacher does without, and measures against its samples",
            ],
        ),
        ("report: {}", ["report: needs evaluate"]),
    ],
)
def test_sections_that_need_each_other(tmp_path, text, expected):
    assert problems(tmp_path, f"name: a\n{text}") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a mapping of sections is expected, found nothing"),
        ("[1]", "a mapping of sections is expected, found a list"),
        ("name", "a mapping of sections is expected, found a str"),
        ("name: a\nname: b", "line 1: 'name' is given twice"),
        ("name: a\ndata:\n  kind: x\n  kind: y", "line 3: 'kind' is given twice"),
        ("name: &a b\nx: *a", "line 2: aliases are not allowed; write the value out"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "line 2: aliases are not allowed"),
        ("name: a\nseed: !!python/object/apply:os.abort []", "line 2: tags such as !!python/object/apply:os.abort are not allowed"),
        ("name: !!str a", "line 1: tags such as !!str are not allowed"),
        ("name: a\nseed: " + "[" * 33 + "]" * 33, "line 2: nested more than 32 deep"),
        ("name: a\n---\nname: b", "line 2: not YAML"),
        ("name: a: b", "line 1: not YAML: mapping values are not allowed here"),
        ("name: 'a", "line 1: not YAML"),
        ("name: a\x01", "not YAML"),
        ("? [a]\n: 1", "line 1: not YAML: found unhashable key"),
        ("seed: " + "9" * 5000, "Exceeds the limit"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(tmp_path, text, expected):
    (line,) = problems(tmp_path, text)
    path = str(tmp_path / "recipe.yaml")
    assert line.startswith(f"{path}: {expected}")
    assert line.count(path) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, expected in ((tmp_path / "nope.yaml", "no such file"), (tmp_path, "is a folder"), (tmp_path / "a\0b", "cannot be read")):
        with pytest.raises(RecipeError, match=expected):
            config.read(path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(RecipeError, match=r"latin\.yaml: cannot be read"):
        config.read(tmp_path / "latin.yaml")


def test_a_huge_file_is_not_parsed(tmp_path):
    (line,) = problems(tmp_path, "name: a\n" + "# filler\n" * 200_000)
    assert "more than 1048576 bytes" in line
    with pytest.raises(RecipeError, match="more than 1048576 bytes"):
        config.read("/dev/zero")


def test_many_keys_do_not_take_long(tmp_path):
    assert "'k0' is given twice" in problems(tmp_path, "{" + ",".join(f"k{i}: 1" for i in range(2000)) + ",k0: 2}")[0]


def test_a_message_cannot_act_on_a_terminal(tmp_path):
    assert problems(tmp_path, 'name: a\n"\\e[2J": 1') == ["\\x1b[2J: unknown key"]


def test_a_long_value_is_shown_short(tmp_path):
    (line,) = problems(tmp_path, f"name: {'x' * 5000}")
    assert len(line) < 250


# ------------------------------------------------------------------ overrides


def test_overrides_reach_everything(tmp_path):
    recipe = read(
        tmp_path,
        FULL,
        "seed=7",
        "seeds=[1, 2, 3]",
        "seeds.0=9",
        "distill.generate.rules.1.weight=2e-1",
        "distill.infer={steps: 5}",
        "arms.0=scratch",
        "arms.2={kind: data_free, steps: 3}",
        "evaluate.n=null",
        "train.model.width=3",
        "compute.save_seconds=0",
        "report=",
    )
    assert recipe.seed == 7
    assert recipe.seeds == (9, 2, 3)
    assert recipe.distill is not None
    assert recipe.distill.generate.rules[1] == config.Rule(nodes="out", weight=0.2)
    assert recipe.distill.infer == config.Encoder(steps=5)
    assert [arm.kind for arm in recipe.arms] == ["scratch", "with_data", "data_free"]
    assert recipe.arms[2].steps == 3
    assert recipe.evaluate is not None
    assert recipe.evaluate.n is None
    assert recipe.train is not None
    assert recipe.train.model.width == 3
    assert recipe.compute.save_seconds == 0
    assert recipe.report is None


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("data_free", {"generate": 1000, "infer": 5}),
        ("{kind: data_free, steps: 3}", {"generate": 3, "infer": 5}),
        ("{kind: data_free, steps: {infer: 9}}", {"generate": 1000, "infer": 9}),
        ("{kind: data_free, steps: {infer: 9, generate: 2}}", {"generate": 2, "infer": 9}),
        ("{kind: data_free, infer: false, steps: {generate: 2}}", {"generate": 2}),
        ("{kind: scratch, steps: {scratch: 7}}", {"scratch": 7}),
        ("{kind: scratch, steps: 8}", {"scratch": 8}),
    ],
)
def test_an_arm_has_updates_of_its_own(tmp_path, arm, expected):
    recipe = read(tmp_path, FULL, f"arms=[{arm}]", "distill.generate.steps=1000", "distill.infer={steps: 5}")
    assert updates(recipe, recipe.arms[0]) == expected
    assert {job: job.seed for job in jobs(recipe)} == {Job(recipe.arms[0], seed): seed for seed in recipe.seeds}


def test_updates_of_a_phase_that_an_arm_does_not_have_are_refused(tmp_path):
    for arm, problem in (
        ("{kind: data_free, steps: {link: 3}}", "arm student_data_free: steps: it has no phase link, only generate, infer"),
        ("{kind: data_free, infer: false, steps: {infer: 3}}", "arm student_data_free: steps: it has no phase infer, only generate"),
        ("{kind: scratch, steps: {infer: 3}}", "arm student_scratch: steps: it has no phase infer, only scratch"),
    ):
        with pytest.raises(RecipeError, match=f"^{problem}$"):
            read(tmp_path, FULL, f"arms=[{arm}]", "distill.infer={steps: 5}")


def test_an_override_makes_the_section_that_is_not_there(tmp_path):
    recipe = read(tmp_path, "name: a\ndata: null", "data.kind=digits", "data.seed=4", "compute.threads=1")
    assert recipe.data == config.DigitsData(kind="digits", seed=4)
    assert recipe.compute.threads == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "seed: an override is written a.b=value"),
        ("=1", "=1: an override is written a.b=value"),
        ("a..b=1", "a..b=1: an override is written a.b=value"),
        ("name.x=1", "name.x=1: name is no section of the recipe"),
        ("seeds.2=1", "seeds.2=1: seeds is a list of 2; an index below that is expected"),
        ("seeds.x=1", "seeds.x=1: seeds is a list of 2; an index below that is expected"),
        ("seeds.-1=1", "seeds.-1=1: seeds is a list of 2; an index below that is expected"),
        ("arms.0.steps=1", "arms.0.steps=1: arms.0 is no section of the recipe"),
        ("seed=[", "seed=[: line 1: not YAML: expected the node content, but found '<stream end>'"),
        ("seed=*x", "seed=*x: line 1: aliases are not allowed; write the value out"),
        ("sede=1", "sede: unknown key; did you mean seed?"),
        ("seed=x", "seed: a number is expected (found 'x')"),
    ],
)
def test_a_wrong_override_is_quoted(tmp_path, override, expected):
    assert problems(tmp_path, FULL, override) == [expected]


# ------------------------------------------------------------------ written and read again


@pytest.mark.parametrize("name", ["a", "1e3", "007", "true", "1.5", "null", "0x1F", "1_000", "on", "2001-01-01", "a.b-c_d"])
def test_what_is_written_is_read_again(tmp_path, name):
    recipe = read(tmp_path, FULL, f'name="{name}"', f'data.path="{name}"')
    (tmp_path / "resolved.yaml").write_text(config.dump(recipe), encoding="utf-8")
    assert config.read(tmp_path / "resolved.yaml") == recipe
    assert yaml.safe_load(config.dump(recipe))["name"] == name  # YAML 1.1, as other programs read it
    assert json.loads(json.dumps(recipe.model_dump(mode="json"), allow_nan=False))["name"] == name


printable = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cf", "Zl", "Zp", "Zs", "Cn", "Co")), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | printable,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(printable, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, database=None)
@given(arguments=st.dictionaries(printable, values, max_size=3))
def test_any_arguments_are_read_again(arguments):
    recipe = config.Recipe(name="a", teacher=config.Python(kind="python", target="a:b", arguments=arguments))
    again = config.check(config._parse(config.dump(recipe), "dump"))
    assert again == recipe
    assert isinstance(again.teacher, config.Python)
    assert again.teacher.arguments == arguments


# ------------------------------------------------------------------ nothing but RecipeError escapes

SMALL = "name: a\nseeds: [0, 1]\ndata: {kind: digits}\nstudent: {width: 3}\nteacher: {kind: python, target: 'a:b', arguments: {x: 1e-3}}\n"
BITS = [
    "&a ",
    "*a",
    "!!int ",
    "<<: ",
    "? ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    ": ",
    "'",
    '"',
    "|",
    ">",
    "%",
    "@",
    "\t",
    "\n",
    "0",
    "9" * 30,
    "~",
    "#",
    "\x85",
]
BITS += [
    "!!python/name:os.system ",
    "\\ud800",
    "\ufeff",
    "...",
    "---\n",
    ".nan",
    "-.inf",
    "true",
    "kind: ",
    "lvae",
    "null",
    "1e400",
    "=",
    "é",
    "\0",
]


@settings(
    max_examples=int(os.environ.get("POTSTILL_FUZZ", "50")),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32))
@example(seed=0)
def test_only_recipe_errors_escape_from_a_mutated_recipe(tmp_path, seed):
    rng = random.Random(seed)  # one number to shrink, and more mutations per second than a text strategy makes
    text = rng.choice([FULL, SMALL])
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(4):
            case 0:
                text = text[:at] + rng.choice(BITS) + text[at:]
            case 1:
                text = text[:at] + text[at + rng.randint(1, 8) :]
            case 2:
                text = text[:at] + chr(rng.choice([rng.randrange(128), rng.randrange(0x250)])) + text[at + 1 :]
            case _:
                other = rng.randrange(len(text) + 1)
                text = text[:at] + text[other : other + rng.randint(1, 30)] + text[at:]
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    overrides = (
        [rng.choice(["a.b=1", f"seeds.{rng.randrange(4)}=1", "data.kind=npz", f"name={rng.choice(BITS)}"])] if rng.random() < 0.3 else []
    )
    recipe, said = None, ""
    try:
        recipe = config.read(tmp_path / "recipe.yaml", overrides)
    except RecipeError as error:
        said = str(error)
    if recipe is None:
        assert said
        assert all(line.isprintable() for line in said.splitlines())
        return
    (tmp_path / "again.yaml").write_text(config.dump(recipe), encoding="utf-8")
    assert config.read(tmp_path / "again.yaml") == recipe
    json.dumps(recipe.model_dump(mode="json"), allow_nan=False)


def test_importing_it_loads_nothing_heavy():
    code = "import sys, potstill.config, potstill.cli; print([m for m in ('torch', 'numpy', 'PIL', 'pyarrow', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("kind", ["scratch", "continual"])
def test_an_arm_of_one_phase_gets_as_many_updates_as_the_others(kind):
    distill = {"generate": {"steps": 300}, "infer": {"steps": 200}}
    base = {"name": "r", "teacher": {"kind": "pretrained", "path": "t"}, "student": {"width": 2}, "surrogate": {"kind": "ancestral"}}
    base |= {"data": {"kind": "digits"}}

    def steps(arms, **more):
        return getattr(config.check(base | {"arms": arms, "distill": distill | more}).distill, kind).steps

    assert steps(["data_free", kind]) == 500
    assert steps(["data_free", kind], infer=None) == 300
    assert steps(["data_free", kind], **{kind: {"steps": 7}}) == 7
    assert steps(["data_free", kind], **{kind: {"batch": 7}}) == 500
    assert steps(["data_free"]) == 1000  # of no use there, and hashed as ever
    again = config.check(base | {"arms": [kind], "distill": distill})
    assert config.check(again.model_dump(mode="json")) == again
