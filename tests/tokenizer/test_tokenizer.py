"""Claims on text -> ids -> text for both kinds of tokenizer, on the files they read, and on generation_config.json."""

import base64
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from tensorrt_llm.tokenizer import (
    QWEN_PATTERN,
    QWEN_SPECIALS,
    GenerationDefaults,
    HfTokenizer,
    QwenTokenizer,
    Tokenizer,
    load_tokenizer,
    read_generation_defaults,
    read_ranks,
)

# The tokenizer does not change, so it may serve all examples of one test.
same_tokenizer = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Characters that all regex engines and Unicode tables in play classify alike.
COMMON_TEXT = st.text(st.sampled_from("abTHEdog'st 's 12,.!?\t\n\r éüß你好请问叫什么通义千问。👍한العر"), max_size=60)
TEXT_WITH_MARKERS = st.lists(
    COMMON_TEXT | st.sampled_from([*QWEN_SPECIALS[:4], "<|extra_204|>", "<|im_", "end|>"])
).map("".join)

BYTES = [f"{base64.b64encode(bytes([value])).decode()} {value}" for value in range(256)]


def with_ranks(folder: Path, lines: list[str]) -> Path:
    path = folder / "qwen.tiktoken"
    path.write_text("\n".join(lines))
    return path


# --- text and ids -----------------------------------------------------------------------------------------------------


@same_tokenizer
@given(text=st.text())
def test_decoding_gives_the_text_back_in_normal_form(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@same_tokenizer
@given(text=COMMON_TEXT)
def test_the_same_merges_give_the_same_ids_in_both_formats(qwen: QwenTokenizer, hf: HfTokenizer, text: str) -> None:
    assert qwen.encode(text) == hf.encode(text)


@same_tokenizer
@given(text=TEXT_WITH_MARKERS)
def test_qwen_gives_the_ids_of_tiktoken(qwen_dir: Path, qwen: QwenTokenizer, text: str) -> None:
    lines = (qwen_dir / "qwen.tiktoken").read_text().split("\n")[:-1]
    ranks = {base64.b64decode(line.split(" ")[0]): int(line.split(" ")[1]) for line in lines}
    specials = {name: len(ranks) + i for i, name in enumerate(QWEN_SPECIALS)}
    reference = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    text = unicodedata.normalize("NFC", text)
    plain = reference.encode(text, disallowed_special=())
    with_specials = reference.encode(text, allowed_special="all")
    assert (qwen.encode(text), qwen.encode_with_specials(text)) == (plain, with_specials)


@same_tokenizer
@given(text=TEXT_WITH_MARKERS)
def test_hf_gives_the_ids_of_transformers(hf_dir: Path, hf: HfTokenizer, text: str) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(hf_dir / "tokenizer.json"))
    plain = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    with_specials = reference(text, add_special_tokens=False)["input_ids"]
    assert (hf.encode(text), hf.encode_with_specials(text)) == (plain, with_specials)


@same_tokenizer
@given(data=st.data(), skip=st.booleans())
def test_any_ids_decode_as_transformers_decodes_them(
    trained: FastTokenizer, tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert tokenizer.decode(ids, skip_special_tokens=skip) == trained.decode(ids, skip_special_tokens=skip)


@same_tokenizer
@given(text=TEXT_WITH_MARKERS)
def test_names_of_special_tokens_in_text_stay_text(tokenizer: Tokenizer, text: str) -> None:
    assert all(tokenizer.token_bytes(token_id) for token_id in tokenizer.encode(text))


def test_names_become_special_tokens_when_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_with_specials("<|im_start|>a<|im_end|>")
    assert ids == [tokenizer.im_start_id, *tokenizer.encode("a"), tokenizer.im_end_id]


def test_special_tokens_are_shown_only_when_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_with_specials("<|im_start|>a<|endoftext|>")
    assert (tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)) == (
        "a",
        "<|im_start|>a<|endoftext|>",
    )


def test_combined_and_decomposed_characters_have_the_same_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")


def test_half_of_a_utf16_pair_becomes_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_two_halves_of_a_utf16_pair_become_their_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("\ud83d\udc4d")) == "👍"


def test_token_bytes_of_a_text_join_to_its_utf8(tokenizer: Tokenizer) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("通义 👍 fox"))) == "通义 👍 fox".encode()


@pytest.mark.parametrize("offset", [-1, 0, 10**9])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, offset: int) -> None:
    unknown = -1 if offset < 0 else tokenizer.vocab_size + offset
    with pytest.raises(ValueError, match=rf"token id {unknown} .* expected 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([0, unknown])


def test_the_highest_id_is_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size - 1], skip_special_tokens=False) == "<|extra_204|>"


def test_a_reply_ends_at_im_end_im_start_or_eod(tokenizer: Tokenizer) -> None:
    assert tuple(tokenizer.stop_ids) == (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id)


def test_a_million_spaces_are_refused(qwen: QwenTokenizer) -> None:
    with pytest.raises(ValueError, match="1000001 whitespace characters in a row, expected at most 500000"):
        qwen.encode("a" + " " * 1_000_001 + "b")


def test_the_longest_accepted_row_of_spaces_is_encoded(qwen: QwenTokenizer) -> None:
    text = "a" + " " * 500_000 + "b"
    assert qwen.decode(qwen.encode(text)) == text


# --- rank files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merges", [0, 1, 37])
def test_special_ids_follow_any_number_of_ranks(tmp_path: Path, merges: int) -> None:
    extra = [f"{base64.b64encode(b'x' * (i + 2)).decode()} {256 + i}" for i in range(merges)]
    qwen = QwenTokenizer(with_ranks(tmp_path, BYTES + extra))
    ids = (qwen.eod_id, qwen.im_start_id, qwen.im_end_id, qwen.vocab_size)
    assert ids == (256 + merges, 257 + merges, 258 + merges, 256 + merges + 208)


def test_rank_lines_may_stand_in_any_order_with_blank_lines(tmp_path: Path) -> None:
    path = with_ranks(tmp_path, ["", *reversed(BYTES), "  ", ""])
    assert read_ranks(path) == {bytes([value]): value for value in range(256)}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no ranks"),
        (BYTES[:-1], "1 of the 256 single bytes have no rank, the first is 0xff"),
        ([*BYTES, "a&&= 256"], r"line 257: found b'a&&=', expected base64"),
        ([*BYTES, "YWI 256"], r"line 257: found b'YWI', expected base64"),
        ([*BYTES, "YWI="], r"line 257: found b'YWI=', expected base64 of a token, a space and its rank"),
        ([*BYTES, "YWI= 256 1"], "line 257: found b'YWI= 256 1', expected"),
        ([*BYTES, "YWI= -1"], "line 257: found b'YWI= -1', expected"),
        ([*BYTES, "YWI= 2.0"], "line 257: found b'YWI= 2.0', expected"),
        ([*BYTES, "YWI= " + "9" * 5000], "line 257: found .*, expected"),
        ([*BYTES, "YWI= 7"], r"line 257: found rank 7 again \(line 8\), expected it once"),
        ([*BYTES, "YQ== 256"], r"line 257: found token b'a' again \(line 98\), expected it once"),
        ([*BYTES, "YWI= 258"], r"rank 256 is missing, expected every rank up to 258, the highest one \(line 257\)"),
        (BYTES[1:], r"rank 0 is missing, expected every rank up to 255, the highest one \(line 255\)"),
    ],
)
def test_a_malformed_rank_file_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = with_ranks(tmp_path, lines)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
        load_tokenizer(tmp_path)


@same_tokenizer
@given(position=st.integers(0, 10**6), junk=st.binary(max_size=8), removed=st.integers(0, 8))
def test_a_damaged_rank_file_is_read_or_refused(tmp_path: Path, position: int, junk: bytes, removed: int) -> None:
    content = "\n".join(BYTES).encode()
    position %= len(content)
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(content[:position] + junk + content[position + removed :])
    try:
        assert len(read_ranks(path)) >= 256
    except ValueError as error:
        assert str(path) in str(error)


# --- folders and tokenizer.json ---------------------------------------------------------------------------------------


def test_the_files_of_the_folder_choose_the_kind(qwen_dir: Path, hf_dir: Path) -> None:
    assert (type(load_tokenizer(qwen_dir)), type(load_tokenizer(str(hf_dir)))) == (QwenTokenizer, HfTokenizer)


def test_the_rank_file_wins_when_both_files_are_there(tmp_path: Path, hf_dir: Path) -> None:
    with_ranks(tmp_path, BYTES)
    (tmp_path / "tokenizer.json").write_bytes((hf_dir / "tokenizer.json").read_bytes())
    assert type(load_tokenizer(tmp_path)) is QwenTokenizer


def test_a_folder_without_tokenizer_is_named_with_both_expected_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + r".*qwen\.tiktoken.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: .* is not a folder"):
        load_tokenizer(tmp_path / "absent")


def edited_hf_dir(source: Path, target: Path, edit: dict[str, Any]) -> Path:
    data = json.loads((source / "tokenizer.json").read_text())
    (target / "tokenizer.json").write_text(json.dumps(data | edit))
    return target


def special(name: str, token_id: int, is_special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": name, "special": is_special, **flags}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"decoder": None}, "decoder is None, expected 'ByteLevel'"),
        ({"decoder": {"type": "Metaspace"}}, "decoder is 'Metaspace', expected 'ByteLevel'"),
        ({"model": {"type": "Rhyme"}}, "not a tokenizer that the tokenizers library can read"),
        ({"added_tokens": []}, "found no end-of-text token, expected a special token"),
        ({"added_tokens": [special("<|im_end|>", 400, False)]}, r'<\|im_end\|> has "special": false, expected true'),
    ],
)
def test_a_wrong_tokenizer_json_is_refused(hf_dir: Path, tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    folder = edited_hf_dir(hf_dir, tmp_path, edit)
    with pytest.raises(ValueError, match=re.escape(str(folder / "tokenizer.json")) + ": " + message):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_tokenizer_json_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("config", [{"eos_token": "</s>"}, {"eos_token": None, "pad_token": {"content": "</s>"}}])
def test_the_end_of_text_may_be_named_by_tokenizer_config(hf_dir: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = edited_hf_dir(hf_dir, tmp_path, {"added_tokens": [special("</s>", 400)]})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).eod_id == 400


def test_a_tokenizer_without_chat_markers_stops_at_its_end_of_text_only(hf_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(edited_hf_dir(hf_dir, tmp_path, {"added_tokens": [special("<|endoftext|>", 400)]}))
    assert (tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.stop_ids) == (None, None, (400,))


def test_an_added_token_that_is_not_special_is_text(hf_dir: Path, tmp_path: Path) -> None:
    added = [special("<|endoftext|>", 400), special("<töol>", 401, is_special=False)]
    tokenizer = load_tokenizer(edited_hf_dir(hf_dir, tmp_path, {"added_tokens": added}))
    assert (tokenizer.encode("<töol>"), tokenizer.decode([401])) == ([401], "<töol>")


def test_truncation_and_padding_of_a_tokenizer_json_are_not_applied(hf_dir: Path, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding: dict[str, Any] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    tokenizer = load_tokenizer(edited_hf_dir(hf_dir, tmp_path, {"truncation": truncation, "padding": padding}))
    assert tokenizer.decode(tokenizer.encode("2023")) == "2023"


# --- generation_config.json -------------------------------------------------------------------------------------------


def test_without_generation_config_nothing_is_recommended(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()


def test_the_recommendations_of_qwen_are_read(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144,'
        ' "max_new_tokens": 512, "do_sample": true, "top_k": 0, "top_p": 0.8, "temperature": 1,'
        ' "repetition_penalty": 1.1, "transformers_version": "4.31.0"}'
    )
    assert read_generation_defaults(tmp_path) == GenerationDefaults(
        chat_format="chatml",
        eos_token_ids=(151643,),
        pad_token_id=151643,
        do_sample=True,
        top_k=0,
        top_p=0.8,
        temperature=1.0,
        repetition_penalty=1.1,
        max_new_tokens=512,
        max_window_size=6144,
    )


def test_several_end_ids_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643], "top_k": null}')
    assert read_generation_defaults(tmp_path) == GenerationDefaults(eos_token_ids=(151645, 151643))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "found a JSON list, expected an object"),
        ('{"top_k": "1"}', "top_k is '1', expected int"),
        ('{"top_k": true}', "top_k is True, expected int"),
        ('{"top_p": NaN}', "top_p is nan, expected float"),
        ('{"top_p": 1e999}', "top_p is inf, expected float"),
        ('{"temperature": 1' + "0" * 400 + "}", "temperature is 10*, expected float"),
        ('{"do_sample": 1}', "do_sample is 1, expected bool"),
        ('{"eos_token_id": []}', r"eos_token_id is \[\], expected an int or a list of ints"),
        ('{"eos_token_id": [1, "2"]}', "eos_token_id is .*, expected an int or a list of ints"),
    ],
)
def test_a_malformed_generation_config_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ": " + message):
        read_generation_defaults(tmp_path)
