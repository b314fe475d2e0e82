"""Which held-out conversations are asked."""

from transformers import AutoTokenizer

from jaxsft.config import DataConfig
from jaxsft.data.chat import ChatEncoder, stop_ids
from jaxsft.data.formats import Conversation, Document
from jaxsft.evaluate import make_questions

REFUSING = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('never') }}{% endif %}"


def ask(question, answer="fine"):
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def test_only_what_the_preparation_keeps_is_asked(repo):
    tokenizer = AutoTokenizer.from_pretrained(repo / "configs" / "quickstart", trust_remote_code=False)
    tokenizer.chat_template = REFUSING + tokenizer.chat_template
    encoder = ChatEncoder(tokenizer, DataConfig.model_validate({"train": "rows"}), stop_ids(tokenizer))
    items = [ask("bad"), ask("good"), Document("text"), ask("long " * 100), ask("also good")]
    assert [each.prompt for each in make_questions(items, encoder, seq_len=200)] == ["user: good", "user: also good"]
    assert len(make_questions(items, encoder)) == 3
    assert len(make_questions(items, encoder, most=1)) == 1
