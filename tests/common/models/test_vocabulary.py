"""A catalog that a language model has no words for is refused with the name of one that has, unless it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.assets import AssetError, language_model
from common.model_plan import ModelPlan
from common.models.build import build_model
from common.models.language_model import LanguageModelError, load_language_model
from common.models.vocabulary import MULTILINGUAL, check_vocabulary, unknown_share
from tests.common.models.folders import saved
from tests.common.models.tiny_models import TEXTS, tiny_tokenizer

CATALOGS: dict[str, list[str]] = {
    "Chinese": [
        "春天的河流与山谷",
        "陶瓷花瓶",
        "智能手机保护套",
        "蓝牙耳机无线运动",
        "不锈钢保温杯",
        "红楼旧梦",
    ],
    "Traditional Chinese": ["春天的河流與山谷", "陶瓷花瓶", "藍牙耳機", "不鏽鋼保溫杯"],
    "Japanese": [
        "静かな夜の物語",
        "陶器の花瓶と小さな灯り",
        "ワイヤレスイヤホン",
        "電気ケトル",
        "夏祭りの思い出",
    ],
    "Arabic": ["قصة الليل الهادئ", "مصباح صغير للطاولة", "حذاء رياضي أزرق", "رحلة إلى الجبل"],
    "Korean": ["조용한 밤의 이야기", "파란 운동화", "전기 주전자"],
    "Russian": ["Тихая ночь", "Маленькая лампа", "Синие кроссовки", "Поездка в горы"],
    "Greek": ["Ήσυχη νύχτα", "Μικρή λάμπα", "Μπλε παπούτσια"],
    "Hebrew": ["סיפור לילה שקט", "מנורה קטנה", "נעליים כחולות"],
    "Thai": ["เรื่องราวของคืนที่เงียบสงบ", "รองเท้าผ้าใบสีน้ำเงิน"],
    "Hindi": ["शांत रात की कहानी", "नीले जूते", "पहाड़ की यात्रा"],
    "Georgian": ["მშვიდი ღამის ამბავი", "პატარა ნათურა"],
    "Armenian": ["Հանգիստ գիշեր", "Փոքր լամպ"],
}
KNOWN: dict[str, list[str]] = {
    "English": [
        "A Quiet Night (1994)",
        "Small table lamp, 3.5 W",
        "Blue running shoes XL",
        "USB-C cable 2 m",
    ],
    "German": ["Glühwürmchen im Straßenverkehr", "Kleine Tischlampe", "Blaue Laufschuhe"],
    "French": ["Une nuit tranquille", "Petite lampe à café", "Chaussures bleues d'été"],
    "Spanish": ["Una noche tranquila", "Lámpara pequeña", "Zapatos azules de niño"],
    "Turkish": ["Sakin bir gece", "Küçük masa lambası", "Mavi koşu ayakkabısı"],
    "Vietnamese": ["Cà phê sữa đá", "Đèn bàn nhỏ", "Giày chạy màu xanh"],
    "names and numbers": ["Xzylophon Qwrt", "ABBA", "K-9 3.14 R2D2", "1 2 3", "a b c"],
    "one foreign title in twenty": [*["A quiet night in the small town"] * 19, "陶瓷花瓶"],
}


@pytest.fixture(scope="module")
def minilm() -> Any:
    """The tokenizer of the default language model."""
    try:
        return load_language_model(language_model("all-MiniLM-L6-v2", offline=True)).tokenizer
    except AssetError:
        pytest.skip("all-MiniLM-L6-v2 is not on this machine")


@pytest.mark.parametrize("language", CATALOGS)
def test_a_catalog_of_another_script_is_refused_by_the_default_model(minilm: Any, language: str) -> None:
    with pytest.raises(LanguageModelError, match=r"does not know .*% of the catalog's tokens") as caught:
        check_vocabulary(minilm, CATALOGS[language])
    assert f'encoder = "{MULTILINGUAL}"' in str(caught.value)
    assert 'unknown_tokens = "allow"' in str(caught.value)
    assert not any(title in str(caught.value) for title in CATALOGS[language])


@pytest.mark.parametrize("language", KNOWN)
def test_a_catalog_in_latin_letters_is_read_by_the_default_model(minilm: Any, language: str) -> None:
    check_vocabulary(minilm, KNOWN[language])
    assert unknown_share(minilm, KNOWN[language]) < 0.1


def a_tokenizer_of(texts: list[str], kind: str) -> Any:
    """A tokenizer with a vocabulary of these texts: `wordpiece`, `byte-level` or `pieces`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]"]
    if kind == "byte-level":
        made, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    elif kind == "pieces":
        words, letters = ({f"▁{word}" for text in texts for word in text.split()}, {*"▁", *"".join(texts)})
        scores = [*((name, 0.0) for name in special), *((word, -8.0) for word in sorted(words))]
        scores += [(letter, -12.0) for letter in sorted(letters - words)]
        made = Tokenizer(models.Unigram(scores, unk_id=1))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    else:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator(texts * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level", "pieces"])
@pytest.mark.parametrize("language", ["Chinese", "Japanese", "Arabic"])
def test_a_vocabulary_of_english_refuses_and_one_of_the_language_reads(kind: str, language: str) -> None:
    english = [text for name in ("English", "German", "French") for text in KNOWN[name]]
    with pytest.raises(LanguageModelError, match="does not know"):
        check_vocabulary(a_tokenizer_of(english, kind), CATALOGS[language])
    check_vocabulary(a_tokenizer_of(english, kind), english)
    check_vocabulary(a_tokenizer_of(CATALOGS[language], kind), CATALOGS[language])


def test_the_share_is_counted_in_tokens_and_the_bound_is_a_tenth() -> None:
    tokenizer = tiny_tokenizer()
    assert unknown_share(tokenizer, ["red sun", "blue qqq"]) == pytest.approx(1 / 4)
    assert unknown_share(tokenizer, ["", " "]) == 0
    check_vocabulary(tokenizer, ["red blue green", "sun moon star", "river hill tree qqq"])
    with pytest.raises(LanguageModelError, match=r"does not know 11% .* \(at most 10% may be unknown\)"):
        check_vocabulary(tokenizer, ["red blue green", "sun moon star", "river hill qqq"])


def test_a_large_catalog_is_counted_at_equal_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.models.vocabulary._TEXTS", 10)
    assert unknown_share(tiny_tokenizer(), ["red"] * 50 + ["qqq"] * 50) == pytest.approx(0.5)


@pytest.mark.parametrize("mode", ["vectors", "lora"])
def test_a_plan_says_whether_an_unknown_catalog_is_trained_on(tmp_path: Path, mode: str) -> None:
    folder, cache = saved(tmp_path / "model"), tmp_path / "cache"
    fields: dict[str, Any] = {"width": 4, "hidden_width": 4, "mode": mode, "lora_layers": 1}
    texts = [*TEXTS, *CATALOGS["Chinese"]]
    allowed = ModelPlan(unknown_tokens="allow", **fields)
    assert build_model(allowed, texts, folder, cache=cache).vectors.shape == (len(texts), 4)
    for _ in range(2):  # what is kept of an allowed one is no way round
        with pytest.raises(LanguageModelError, match="does not know"):
            build_model(ModelPlan(**fields), texts, folder, cache=cache)


def test_a_plan_that_refuses_says_what_plans_of_before_said() -> None:
    assert "unknown_tokens" not in ModelPlan().model_dump_json()
    assert (
        ModelPlan.model_validate_json(ModelPlan(unknown_tokens="allow").model_dump_json()).unknown_tokens
        == "allow"
    )


@pytest.mark.parametrize("language", ["Chinese", "Japanese", "Arabic"])
def test_the_command_refuses_such_a_catalog_in_a_line_and_trains_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], language: str
) -> None:
    from common.cli import main
    from tests.tiny import own_cache, tiny_files, tiny_language_model

    log, catalog = tiny_files(tmp_path / "data", items=12)
    titles = CATALOGS[language]
    rows = [f"i{item},{titles[item % len(titles)]} {item}" for item in range(12)]
    catalog.write_text("\n".join(["item,text", *rows]) + "\n", encoding="utf-8")
    folder = tiny_language_model(tmp_path / "model")
    command = [
        *("simulate", "--log", str(log), "--catalog", str(catalog), "--encoder", str(folder)),
        *("--runs", str(tmp_path / "runs"), "--engine", "inline", "--n-sites", "2", "--offline"),
        *("--users-per-site", "15", "--rounds", "1", "--steps", "2", "--baseline-epochs", "0"),
        *("--set", "model.width=8", "--set", "model.hidden_width=4"),
    ]
    with own_cache(tmp_path / "cache"):
        with pytest.raises(SystemExit) as end:
            main(command)
        errors = capsys.readouterr().err
        assert end.value.code == 2
        assert MULTILINGUAL in errors.splitlines()[-1]
        assert "Traceback" not in errors
        with pytest.raises(SystemExit) as end:
            main([*command, "--set", "model.unknown_tokens=allow"])
    assert end.value.code == 0
