import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.transformers_video import full_processor
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import BadRequest, UnsupportedModel
from triptych.router.detokenize import MOST_PENDING, Detokenizer
from triptych.router.openai import ChatRequest, parse
from triptych.router.prompt import Prompter

PAD = "<|image_pad|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prompter(folder: Path) -> Prompter:
    return Prompter(ModelConfig(str(folder)))


def chat(*contents: Any) -> ChatRequest:
    messages = [{"role": "user", "content": content} for content in contents]
    return parse(json.dumps({"model": "m", "messages": messages}).encode())


def image() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:,"}}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


# ------------------------------------------------------------------ prompt


def test_one_marker_for_each_image(prompter: Prompter) -> None:
    rendered = prompter.render(chat([image(), text("what is this?"), image()]))
    assert rendered.count(prompter.placeholder) == 2
    assert rendered.index("what is this?") > rendered.index(prompter.placeholder)


def test_a_video_for_a_model_without_videos(tmp_path: Path) -> None:
    prompter = Prompter(ModelConfig(str(make_tiny_model(tmp_path, "llava"))))
    video = {"type": "video_url", "video_url": {"url": "data:,"}}
    with pytest.raises(BadRequest, match="llava takes no videos here") as refused:
        prompter.render(chat([image(), video]))
    assert refused.value.param == "messages"
    assert prompter.render(chat([image(), text("<video>?")])).count("<image>") == 1


def test_smolvlm_writes_conversations_with_videos_in_another_way(tmp_path: Path) -> None:
    """As its processor does: its checkpoints' templates may know no videos."""
    folder = make_tiny_model(tmp_path / "model", "smolvlm")
    own = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(own.replace("<video>", ""))
    prompter, processor = Prompter(ModelConfig(str(folder))), full_processor(folder)
    film = {"type": "video_url", "video_url": {"url": "data:,"}}
    requests: list[tuple[Any, ...]] = [
        ([image(), text("and "), film],),
        ("Hello.", [film, text("what?")], "A string."),
        ([film, image()], ""),
        ([image(), text("what?")],),
    ]
    for contents in requests:
        request = chat(*contents)
        messages = request.for_template()
        for message in messages:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        expected = processor.apply_chat_template(messages, add_generation_prompt=True)
        found = prompter.render(request)
        assert found == expected
        assert ("<end_of_utterance>" in found) == ("<video>" in found)


@pytest.mark.parametrize(
    ("contents", "param"),
    [
        ([f"a {PAD} b"], "messages[0].content"),
        (["hi", [text("ok"), text(f"{PAD}")]], "messages[1].content[1].text"),
        ([[text("<|image"), text("_pad|>")]], "messages"),
    ],
)
def test_a_marker_in_a_text_is_refused(prompter: Prompter, contents: list[Any], param: str) -> None:
    with pytest.raises(BadRequest, match=r"<\|image_pad\|>") as caught:
        prompter.render(chat(*contents))
    assert caught.value.param == param


async def test_tokens_equal_the_tokenizers_own(prompter: Prompter, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [PAD * 4, f"{PAD * 1000}\n{PAD * 3}", PAD]
    rendered = prompter.render(chat([image(), text("a\nb"), image(), image()]))
    expanded = rendered
    for item in texts:
        expanded = expanded.replace(PAD, "\0", 1).replace("\0", item.replace(PAD, "\1"))
    expanded = expanded.replace("\1", PAD)
    ids = await prompter.tokens(rendered, texts)
    assert ids == tokenizer(expanded)["input_ids"]
    assert ids.count(prompter.image_token_id) == 1008


async def test_a_long_prompt_is_tokenized_the_same_on_a_thread(prompter: Prompter) -> None:
    words = "the red circle and the blue square " * 400
    rendered = prompter.render(chat(words))
    assert await prompter.tokens(rendered, []) == prompter._encode(rendered)


def test_end_tokens_come_from_the_generation_settings(prompter: Prompter, folder: Path) -> None:
    named = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(named) <= set(prompter.stop_ids)
    assert all(prompter.decode([token]) == "" for token in prompter.stop_ids)


@pytest.mark.parametrize("where", ["chat_template.json", "tokenizer_config.json"])
def test_older_places_of_the_template(
    prompter: Prompter, folder: Path, tmp_path: Path, where: str
) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    template = (folder / "chat_template.jinja").read_text()
    target = tmp_path / where
    content = json.loads(target.read_text()) if target.exists() else {}
    target.write_text(json.dumps({**content, "chat_template": template}))
    request = chat([image(), text("hi")])
    assert Prompter(ModelConfig(str(tmp_path))).render(request) == prompter.render(request)


def test_no_template_and_no_model_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UnsupportedModel, match="chat template"):
        Prompter(ModelConfig(str(tmp_path)))
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        Prompter(ModelConfig(str(tmp_path / "missing")))


def test_a_template_of_parts_only_gets_parts(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ p.text }}{% endfor %}{% endfor %}"
    )
    assert Prompter(ModelConfig(str(tmp_path))).render(chat("hello")) == "hello"


def test_a_template_that_refuses(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequest, match="roles must alternate"):
        Prompter(ModelConfig(str(tmp_path))).render(chat("hello"))


# ------------------------------------------------------------------ text


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    """Byte-level BPE of which most tokens are single bytes, so that characters are often cut."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["héllo wörld 你好 😀 stop end of text"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def run(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[str]:
    pieces: list[str] = []
    for token in tokens:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            return pieces
    return [*pieces, detokenizer.finish()]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), n=st.integers(0, 60), additive=st.booleans())
def test_pieces_joined_equal_all_at_once(
    bytewise: PreTrainedTokenizerFast, seed: int, n: int, additive: bool
) -> None:
    rng = random.Random(seed)
    common = [*bytewise("héllo 你 end", add_special_tokens=False)["input_ids"]]
    tokens = [rng.choice((rng.randrange(len(bytewise)), rng.choice(common))) for _ in range(n)]

    def decode(ids: Sequence[int]) -> str:
        return str(bytewise.decode(ids, skip_special_tokens=True))

    assert "".join(run(Detokenizer(decode, additive=additive), tokens)) == decode(tokens)


@settings(max_examples=200, deadline=None)
@given(
    words=st.text("aeho 你😀é", max_size=30),
    stops=st.lists(st.text("aeho 你", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_text_ends_before_the_first_stop_string(
    bytewise: PreTrainedTokenizerFast, words: str, stops: list[str]
) -> None:
    tokens = bytewise(words, add_special_tokens=False)["input_ids"]
    additive = len(words) % 2 == 0
    detokenizer = Detokenizer(lambda ids: str(bytewise.decode(ids)), stops, additive=additive)
    found = "".join(run(detokenizer, tokens))
    cuts = [words.find(stop) for stop in stops if stop in words]
    assert detokenizer.stopped == bool(cuts)
    # With several stop strings the one that is complete first decides.
    if not cuts:
        assert found == words
    elif len(stops) == 1:
        assert found == words[: cuts[0]]
    else:
        assert words.startswith(found) and not any(stop in found for stop in stops)


def test_a_stop_string_over_several_tokens_never_shows_in_part() -> None:
    letters = dict(enumerate(["wor", "d en", "d of", " tex", "t end", " of ", "x"]))
    detokenizer = Detokenizer(lambda ids: "".join(letters[i] for i in ids), ["end of text", "zz"])
    assert run(detokenizer, [0, 1, 2, 3, 4]) == ["wor", "d ", "", "", ""]
    assert detokenizer.stopped
    again = Detokenizer(lambda ids: "".join(letters[i] for i in ids), ["end of text"])
    assert run(again, [1, 2, 6]) == ["d ", "", "end ofx", ""]


def test_text_held_for_a_stop_string_is_sent_at_the_end() -> None:
    detokenizer = Detokenizer(lambda ids: "".join("ab"[i] for i in ids), ["ba"])
    assert run(detokenizer, [0, 1]) == ["a", "", "b"]


@pytest.mark.parametrize("additive", [False, True])
def test_a_cut_character_waits_for_its_rest(
    bytewise: PreTrainedTokenizerFast, additive: bool
) -> None:
    tokens = [bytewise.convert_tokens_to_ids(c) for c in "aðŁĺĢa"]
    detokenizer = Detokenizer(lambda ids: str(bytewise.decode(ids)), additive=additive)
    assert [detokenizer.push(t) for t in tokens] == ["a", "", "", "", "😀", "a"]


def test_whole_characters_are_decoded_one_by_one(bytewise: PreTrainedTokenizerFast) -> None:
    """Where a tokenizer puts bytes together and does nothing else."""
    asked: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        asked.append(len(ids))
        return str(bytewise.decode(ids))

    tokens = bytewise("end of text 你", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(decode, additive=True)
    assert "".join(run(detokenizer, tokens)) == "end of text 你"
    assert asked[:5] == [1] * 5


def test_only_byte_level_tokenizers_are_additive(tmp_path: Path) -> None:
    """Others join pieces with spaces, or take one away from the first."""
    folder = make_tiny_model(tmp_path, "qwen3_vl")
    assert Prompter(ModelConfig(str(folder))).additive
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"}
    path.write_text(json.dumps(settings))
    assert not Prompter(ModelConfig(str(folder))).additive


def test_bytes_that_never_make_a_character_are_sent_at_last() -> None:
    detokenizer = Detokenizer(lambda ids: "\ufffd" * len(ids))
    pieces = [detokenizer.push(0) for _ in range(3 * MOST_PENDING)]
    assert "".join(pieces) == "\ufffd" * 3 * MOST_PENDING
    assert pieces.count("") == 3 * (MOST_PENDING - 1)
