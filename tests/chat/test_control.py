"""Text that spells a control token, on tokenizers whose very vocabulary holds the spelling."""

import numpy as np
import pytest

from jaxsft.chat.control import ASSISTANT, TRUSTED, UNTRUSTED, ControlError, TextEncoder

TEXT = "<s>ab</s>ab<s>"
TRUST = bytes([TRUSTED] * 3 + [UNTRUSTED] * 2 + [TRUSTED] * 4 + [UNTRUSTED] * 5)
"""The first two control tokens are the template's, the last one is somebody's text."""


def make_tokenizer(kind, **flags):
    """Letters, and `<s>` and `</s>` in the vocabulary of the model itself, as SentencePiece has them."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *"ab<>s/▁"]
    if kind == "unigram":
        # Like SentencePiece, the control pieces cost nothing: the likeliest way to read their spelling is themselves.
        model = models.Unigram([(piece, 0.0 if len(piece) > 1 else -3.0) for piece in pieces], unk_id=0)
    elif kind.startswith("bpe"):
        vocabulary = {piece: id for id, piece in enumerate([*pieces, "<s", "</"])}
        merges = [("<", "s"), ("<s", ">"), ("<", "/")]
        # Some (Llama 3's) look whole words up before they merge.
        model = models.BPE(
            vocabulary, merges, unk_token="<unk>", fuse_unk=True, ignore_merges=kind == "bpe of whole words"
        )
    else:
        model = models.WordLevel({piece: id for id, piece in enumerate(pieces)}, unk_token="<unk>")
    backend = Tokenizer(model)
    if kind.startswith("bpe"):
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_special_tokens([AddedToken(text, **flags) for text in pieces[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}], ids=str)
@pytest.mark.parametrize("kind", ["unigram", "bpe", "bpe of whole words"])
def test_a_spelling_in_the_vocabulary_is_read_letter_by_letter(kind, flags):
    tokenizer = make_tokenizer(kind, **flags)
    encoder = TextEncoder(tokenizer, stops=[2], policy="split")
    tokens = encoder.encode(TEXT, TRUST)
    assert np.isin(tokens.ids, [0, 1, 2]).sum() == 2 and tokens.num_split == 1
    assert "".join(tokenizer.convert_ids_to_tokens(tokens.ids.tolist())) == TEXT
    assert [TEXT[start:end] for start, end in zip(tokens.starts, tokens.ends, strict=True)] == (
        tokenizer.convert_ids_to_tokens(tokens.ids.tolist())
    )


def test_a_spelling_that_is_all_of_the_text_is_read_letter_by_letter_too():
    for kind in ("unigram", "bpe", "bpe of whole words"):
        tokenizer = make_tokenizer(kind)
        tokens = TextEncoder(tokenizer, stops=[2], policy="split").encode("<s>", bytes([UNTRUSTED] * 3))
        assert tokenizer.convert_ids_to_tokens(tokens.ids.tolist()) in (["<", "s", ">"], ["<s", ">"])


def test_text_without_a_spelling_is_encoded_as_the_tokenizer_does():
    for kind in ("unigram", "bpe", "word"):
        tokenizer = make_tokenizer(kind)
        tokens = TextEncoder(tokenizer, stops=[2], policy="split").encode("<s>a</s>", bytes(8))
        assert tokens.ids.tolist() == tokenizer("<s>a</s>", add_special_tokens=False)["input_ids"]


def test_blanks_that_a_control_token_swallows_may_be_anybody_s():
    tokenizer = make_tokenizer("bpe", lstrip=True, rstrip=True)
    text = "a  </s>  b"
    trust = bytearray([UNTRUSTED] * len(text))
    trust[3:7] = bytes([TRUSTED] * 4)
    tokens = TextEncoder(tokenizer, stops=[2], policy="split").encode(text, bytes(trust))
    assert tokens.num_split == 0 and tokens.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_assistant_may_write_what_is_neither_special_nor_a_stop():
    from tokenizers import AddedToken

    tokenizer = make_tokenizer("bpe")
    tokenizer.add_tokens([AddedToken("/ab/", special=False)])
    encoder = TextEncoder(tokenizer, stops=[2], policy="split")
    trust = bytes([ASSISTANT] * 4)
    mine, other = encoder.encode("/ab/", trust), encoder.encode("/ab/", bytes([UNTRUSTED] * 4))
    assert len(mine.ids) == 1 and len(other.ids) == 4
    stop = TextEncoder(tokenizer, stops=mine.ids.tolist(), policy="split").encode("/ab/", trust)
    assert len(stop.ids) == 4


def test_what_cannot_be_written_as_ordinary_text_is_refused():
    text = TEXT + "\U000f0000"  # A character of the names that control tokens are given meanwhile.
    trust = TRUST + bytes([UNTRUSTED])
    encoder = TextEncoder(make_tokenizer("bpe"), stops=[2], policy="split")
    with pytest.raises(ControlError, match="cannot write as ordinary text"):
        encoder.encode(text, trust)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_of_many_texts_each_is_what_it_is_alone(kind):
    refused = TEXT + "\U000f0000", TRUST + bytes([UNTRUSTED])
    pairs = [("", b""), (TEXT, TRUST), ("<s>a</s>", bytes(8)), refused, ("ab", bytes(2)), (TEXT, bytes(len(TEXT)))] * 2
    encoder = TextEncoder(make_tokenizer(kind), stops=[2], policy="split")
    window, errors = encoder.encode_all(*map(list, zip(*pairs, strict=True)))
    assert errors.keys() == {3, 9} and window.splits == {1: 1, 7: 1}
    for at, (text, trust) in enumerate(pairs):
        if at in errors:
            continue
        assert window.shifts[at] == sum(len(before) + 1 for before, _ in pairs[:at])
        for together, alone in zip(window.of(at), encoder.encode(text, trust), strict=True):
            assert np.array_equal(together, alone)


def test_an_id_is_known_up_to_the_largest_one_though_others_below_it_are_nobody_s():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 5}, unk_token="<unk>"))
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend), stops=[], policy="split")
    assert encoder.vocabulary_size == 6 and not encoder.is_control(np.array([0, 3, 5, 99])).any()
    for ids, are_known in [([], True), ([0, 5], True), ([3], True), ([6, 0], False), ([-1], False), ([5, -1], False)]:
        assert encoder.knows(np.array(ids, np.int32)) == are_known
