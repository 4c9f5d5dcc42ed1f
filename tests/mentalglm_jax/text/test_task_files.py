"""Task files: every key is read and written again, what is wrong is one line that names file, task and key."""

import copy
import json

import pytest
import yaml

from mentalglm_jax.errors import InputError
from mentalglm_jax.text import tasks
from tests.mentalglm_jax.own_tasks import DISTORTED, MOOD, PATH, TENSION, definitions

FULL = {
    "description": "All keys there are.", "kind": "hierarchy",
    "question": {"en": ["What is it?", "What else is it?"], "de": "Was ist es?"},
    "sentence": {"en": "This is {}.", "de": "Das ist {}."},
    "prompt": {"en": "Post: {post}\n\n{question}", "de": "Beitrag: {post} Frage: {question}"},
    "system": {"en": "Answer briefly."}, "joiner": {"de": " und "},
    "markers": {"de": {"explanation": "Begründung:", "label": "Antwort:"}},
    "positive": "fear", "parents": {"feeling": {"name": {"en": "Feeling", "de": "Gefühl"}}, "thought": {}},
    "labels": {
        "fear": {"name": {"en": "fear", "de": "Angst"}, "parent": "feeling", "aliases": ["afraid", "scared"]},
        "doubt": {"name": {"en": "doubt", "de": "Zweifel"}, "parent": "thought"},
        "nothing": {"sentence": {"en": "There is nothing.", "de": "Da ist nichts."}, "parent": "thought"},
    },
}  # fmt: skip


def test_every_key_survives_a_file(tmp_path):
    (task,) = tasks.tasks_of({"full": FULL}, "here")
    assert tasks.task_record(task) == FULL
    tasks.write_tasks(tmp_path / "tasks.yaml", [task, *definitions()])
    assert tasks.read_tasks(tmp_path) == (task, *definitions())
    assert tasks.tasks_of(json.loads(json.dumps({"full": tasks.task_record(task)})), "row") == (task,)
    assert task.prompt("a {question} b", "What is it?", "en") == "Post: a {question} b\n\nWhat is it?"
    assert task.all_questions("en") == ("What is it?", "What else is it?") and task.system("de") is None
    assert tasks.answer(task, ["doubt", "fear"], "sagt es", "de") == "Das ist Zweifel und Angst. Begründung: sagt es"
    assert tasks.parse(task, "de", "Das ist Zweifel und Angst.\n**Begründung:** sagt es").labels == ("fear", "doubt")
    assert tasks.parse(task, "de", "ANTWORT: Angst\nbegründung: sagt es").labels == ("fear",)
    assert tasks.parse(task, "de", "Da ist nichts. Begründung: leer").labels == ("nothing",)
    spelled = task.spellings("de")
    assert list(spelled)[:3] == ["Angst", "Zweifel", "nothing"]
    assert spelled["scared"] == spelled["Feeling##fear"] == spelled["Gefühl##Angst"] == spelled["fear"] == "fear"
    with pytest.raises(InputError, match="'nothing' stands alone"):
        task.ordered(["fear", "nothing"])


def change(**changes):
    """A definition that is right but for ``changes`` ("labels.calm.name": ...; None takes the key out)."""
    raw = copy.deepcopy(MOOD)
    for place, value in changes.items():
        *above, last = place.split("__")
        node = raw
        for key in above:
            node = node[key]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return raw


BAD = [
    (change(kind="singel"), "task 'mood': kind 'singel' is unknown; did you mean 'single'"),
    (change(kind=None), "task 'mood': kind is missing; known: single"),
    (change(questions={"en": "x"}), "unknown key 'questions'; did you mean 'question'"),
    (change(labels__calm={"nam": {"en": "calm"}}), "unknown key 'labels.calm.nam'; did you mean 'name'"),
    (change(labels__calm__name__fr="calme"), "labels.calm.name language 'fr' has no question; languages of the"),
    (change(labels__calm__name__en=True), "labels.calm.name.en must be text, got True; put it in quotes"),
    (change(labels__calm__name__en=""), "labels.calm.name.en is empty"),
    (change(labels__calm__name__en="x" * 300), "labels.calm.name.en must be at most 200 characters, got 300"),
    (change(labels__calm__name__en="a\x07b"), "labels.calm.name.en holds a control character"),
    (change(labels={"yes": {}, False: {}}), "labels the key False must be text; put it in quotes"),
    (change(labels={"a,b": {}, "c": {}}), "labels the key 'a,b' must be at most 64 characters without tab, comma"),
    (change(labels={"calm": {}}), "labels must be a mapping of 2 to 500 keys"),
    (change(labels=["calm", "tense"]), "labels must be a mapping of 2 to 500 keys to names, got ['calm', 'tense']"),
    (change(question="What?"), "question must be a mapping of languages to text"),
    (change(question={}), "question must be a mapping of languages to text"),
    (change(question={"English": "What?"}), "'English' is no language code"),
    (change(question__en=["What?", "What?"]), "question.en asks one question twice"),
    (change(question__en=7), "question.en must be text, got 7; put it in quotes"),
    (change(sentence__en="The mood is calm."), "sentence.en must hold {} once"),
    (change(sentence__en=None), "sentence is missing for language en: label 'calm' has no sentence of its own"),
    (change(sentence=None), "sentence is missing for language en"),
    (change(prompt={"en": "{question}"}), "prompt.en must hold {post} once"),
    (change(prompt={"en": "{post}"}, question__en=["One?", "Two?"]), "prompt.en must hold {question}"),
    (change(question={"de": "Was?"}, sentence={"de": "{}."}, labels={"a": {}, "b": {}}),
     "prompt is missing for language de; give it such as {de: 'Consider"),
    (change(question={"de": "Was?"}, sentence={"de": "{}."}, labels={"a": {}, "b": {}}, prompt={"de": "{post}"}),
     "markers are missing for language de"),
    (change(markers={"en": {"explanation": "Because:"}}), "markers.en.label is missing"),
    (change(markers={"en": {"explanation": "So:", "label": "so :"}}), "markers.en must be two different words"),
    (change(positive="calmm"), "positive 'calmm' is unknown; did you mean 'calm'"),
    (change(joiner={"en": ", "}), "joiner stands between several labels; kind single states one"),
    (change(parents={"a": {}}), "parents go with kind hierarchy"),
    (change(labels__calm__parent="a"), "labels.calm.parent must be one of parents in a hierarchy"),
    (change(labels__calm__aliases=["tense"]), "labels.calm.aliases 'tense' also means label 'tense'"),
    (change(labels__calm__name__en="Tense!"), "is Tense!.' and 'The mood of this post is tense.' are one sentence"),
    (change(labels__calm__name__en="**tense**"), "are one sentence, or look like it, once case, width"),
    (change(labels__calm__name__en="ｔｅｎｓｅ"), "are one sentence, or look like it, once case, width"),
    (change(labels__calm__name__en="calm Reasoning: none"), "holds 'Reasoning' with a colon"),
    (change(labels__calm__sentence={"en": "Answer: it is calm."}), "holds 'Answer' with a colon"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_file_is_one_line_that_names_file_task_and_key(tmp_path, raw, message):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"tasks": {"mood": raw}}, sort_keys=False, allow_unicode=True))
    with pytest.raises(InputError) as error:
        tasks.read_tasks(path)
    said = str(error.value)
    assert message in said and said.startswith(f"{path}: task ") and "mood" in said and "\n" not in said


SEVERAL = [
    ({"a": "sad", "b": "tired", "c": "sad, tired"}, "would be read as 2 labels"),
    (
        {"a": "sad", "b": "tired", "c": "sad; tired"},
        "'These: sad; tired.' and 'These: sad, tired.' cannot be told apart",
    ),
    ({"a": "sad", "b": "tired", "c": "tired、sad"}, "cannot be told apart: the one name is made of the others"),
]


@pytest.mark.parametrize(("names", "message"), SEVERAL)
def test_names_that_are_made_of_names_are_refused(names, message):
    labels = {key: {"name": {"en": name}} for key, name in names.items()}
    raw = {"kind": "multi", "question": {"en": "Which?"}, "sentence": {"en": "These: {}."}, "labels": labels}
    with pytest.raises(InputError) as error:
        tasks.tasks_of({"own": raw}, "f.yaml")
    assert message in str(error.value)
    # Kinds that state one label may have such names: nothing is joined.
    assert tasks.tasks_of({"own": raw | {"kind": "single"}}, "f.yaml")[0].keys == ("a", "b", "c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: 3", "tasks must be a mapping of 1 to 100 names to definitions, got 3"),
        ("tasks: {}", "tasks must be a mapping"),
        ("run_dir: runs/x", "unknown key 'run_dir'; a task file has one key, tasks"),
        ("tasks: {mood: {kind: single}, mood: {kind: multi}}", "the key 'mood' stands more than once"),
        ("tasks: {'a b': {}}", "the task name 'a b' must be text of letters"),
        ("tasks: {1: {}}", "the task name 1 must be text"),
        ("tasks: {mood: []}", "task 'mood': must be a mapping of description, kind"),
        ("- 1", "must be a mapping of keys to values"),
        ("tasks: [", "not valid YAML"),
    ],
)
def test_what_is_no_task_file(tmp_path, text, message):
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        tasks.read_tasks(tmp_path / "tasks.yaml")
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / "tasks.yaml"))


def test_adding_is_idempotent_and_never_changes_what_a_name_means():
    mood, tension = definitions("mood", "tension")
    assert "mood" not in tasks.TASKS and not tasks.added_tasks()
    tasks.add_tasks([mood])
    tasks.add_tasks(tasks.tasks_of({"mood": copy.deepcopy(MOOD)}, "again"))
    assert tasks.get_task("mood") == mood and list(tasks.TASKS)[-1] == "mood" and len(tasks.TASKS) == 16
    (other,) = tasks.tasks_of({"mood": change(question__en="How is it?")}, "other")
    with pytest.raises(
        InputError, match=r"x.yaml: task 'mood' is known with another definition .other questions.; give"
    ):
        tasks.add_tasks([tension, other], "x.yaml")
    assert "tension" not in tasks.TASKS, "half of a file was added"
    (risk,) = tasks.tasks_of({"suicide_risk": MOOD}, "x.yaml")
    with pytest.raises(InputError, match="'suicide_risk' comes with this package"):
        tasks.add_tasks([risk])
    tasks.add_tasks([tasks.TASKS["suicide_risk"]])
    assert tasks.added_tasks() == (mood,) and tasks.added_tasks(["suicide_risk"]) == ()


def test_no_test_leaves_a_task_behind():
    assert not tasks.added_tasks()


@pytest.mark.parametrize("name", tasks.BUILT_IN)
def test_the_tasks_of_the_package_are_task_files(name):
    path = tasks._ASSETS / f"{name}.yaml"
    assert tasks.read_tasks(path) == (tasks.TASKS[name],) and tasks.TASKS[name].description
    assert path.read_text(encoding="utf-8") == tasks.tasks_text([tasks.TASKS[name]])


def test_there_is_no_other_file():
    assert {path.stem for path in tasks._ASSETS.iterdir()} == set(tasks.BUILT_IN)


@pytest.mark.parametrize("task", definitions(), ids=lambda task: task.name)
def test_own_answers_are_read_back(task):
    for language in task.languages:
        for order in ("label_first", "explanation_first"):
            for key in task.keys:
                said = tasks.answer(task, [key], "he says so", language, order)
                assert tasks.parse(task, language, said).labels == (key,)
        if task.arity == "multi":
            every = [label.key for label in task.labels if not label.whole][::-1]
            assert tasks.parse(task, language, tasks.answer(task, every, "x", language)).labels == task.ordered(every)


@pytest.mark.parametrize(
    ("text", "labels", "explanation"),
    [
        ("This post shows high suicide risk. reasoning: they say so", ("high",), "they say so"),
        ("HIGH\n\nREASONING: they say so", ("high",), "they say so"),
        ("**high**. **reasoning**: they say so", ("high",), "they say so"),
        ("reasoning: they say so\nanswer: high", ("high",), "they say so"),
        ("Reasoning: they say so.\nANSWER: **high**", ("high",), "they say so."),
        # In the midst of a sentence, or beside a marker written as it should be, it is what the explanation says.
        ("Reasoning: is the answer: high", None, "is the answer: high"),
        ("Reasoning: they say so. answer: low. Answer: high", ("high",), "they say so. answer: low."),
        ("high my reasoning: they say so", None, None),
        ("not high. reasoning: they say so", None, "they say so"),
    ],
)
def test_markers_in_another_case(text, labels, explanation):
    parsed = tasks.parse("suicide_risk", "en", text)
    assert (parsed.labels, parsed.explanation) == (labels, explanation)


def test_what_could_state_two_labels_states_none():
    """ "high risk" is the one label alone, or the other with the words that follow it in the sentence."""
    labels = {key: {"name": {"en": name}} for key, name in {"a": "high", "b": "high risk"}.items()}
    raw = {"kind": "single", "question": {"en": "?"}, "sentence": {"en": "It is {} risk."}, "labels": labels}
    (task,) = tasks.tasks_of({"own": raw}, "f.yaml")
    assert tasks.parse(task, "en", "high risk").labels is None
    assert tasks.parse(task, "en", "high").labels == ("a",)
    assert tasks.parse(task, "en", "high risk risk").labels == ("b",)


def test_kinds_of_own_tasks():
    by_name = {task.name: task for task in definitions()}
    assert [by_name[name].arity for name in ("mood", "distorted", "tension", "path")] == [
        "single", "multi", "single", "multi"]  # fmt: skip
    assert {MOOD["kind"], DISTORTED["kind"], TENSION["kind"], PATH["kind"]} == {
        "single",
        "multi",
        "ordinal",
        "hierarchy",
    }
