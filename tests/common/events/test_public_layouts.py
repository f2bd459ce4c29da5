"""Public data sets: small made-up files in the layout of each, read with the options that docs/logs.md gives for it."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.columns import column_mapping
from common.events.catalog import read_catalog
from common.events.layout import Layout
from common.events.readers import scan_log
from tests.common.events.reading import events, refusal, write

DOCUMENT = (Path(__file__).parents[3] / "docs" / "logs.md").read_text(encoding="utf-8")


def _lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _python(*rows: dict[str, Any]) -> str:
    return "".join(f"{row!r}\n" for row in rows)


@dataclass(frozen=True)
class Public:
    """A data set's files, with the options of the page, and what is to be read: user, item, kind, value."""

    name: str
    log: str
    content: str | bytes
    options: str
    wanted: tuple[tuple[str, str, str, float | None], ...]
    times: tuple[int, ...] | None = None
    catalog: str = ""
    items: str | bytes = ""
    catalog_options: str = ""
    catalog_wanted: tuple[tuple[str, str, tuple[str, ...]], ...] = ()


_FLAGS = "|".join(["0"] * 5 + ["1"] + ["0"] * 13)
_REVIEW_2014 = {
    "reviewerID": "A2SUAM1J3GNN3B",
    "asin": "0000013714",
    "reviewerName": 'J. "Mac"',
    "helpful": [2, 3],
    "reviewText": "I bought this.\nIt is good",
    "overall": 5.0,
    "summary": "Heavenly",
    "unixReviewTime": 1252800000,
    "reviewTime": "09 13, 2009",
}
_REVIEW_2023 = {
    "rating": 4.0,
    "title": "Light, not heavy",
    "text": 'Says "5 inch"',
    "images": [{"small_image_url": "x"}],
    "asin": "B00YQ6X8EO",
    "parent_asin": "B00YQ6X8EP",
    "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
    "timestamp": 1588687728923,
    "helpful_vote": 0,
    "verified_purchase": True,
}
_META_2023 = _lines(
    {
        "main_category": "All Beauty",
        "title": "A brush",
        "features": [],
        "description": ["soft", "small"],
        "price": None,
        "images": [{"thumb": "x"}],
        "categories": ["Beauty", "Tools"],
        "details": {"Brand": "B"},
        "parent_asin": "B00YQ6X8EP",
    }
)
_AMAZON_2023 = (("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8EP", "view", 4.0),)
_BRUSH = (("B00YQ6X8EP", "A brush", ("Beauty", "Tools")),)

PUBLIC = [
    Public(
        "MovieLens 100K",
        "u.data",
        "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
        "",
        (("186", "302", "rating", 3.0), ("196", "242", "rating", 3.0)),
        (891717742, 881250949),
        "u.item",
        f"242|L\u00e9on (1994)|01-Jan-1994||http://x|{_FLAGS}\n".encode("latin-1"),
        "",
        (("242", "L\u00e9on (1994)", ("Comedy",)),),
    ),
    Public(
        "MovieLens 1M",
        "ratings.dat",
        "1::1193::5::978300760\n1::661::3::978302109\n",
        "",
        (("1", "1193", "rating", 5.0), ("1", "661", "rating", 3.0)),
        (978300760, 978302109),
        "movies.dat",
        "1193::Mis\u00e9rables, Les: A Film (1995)::Drama|Musical\n".encode("latin-1"),
        "",
        (("1193", "Mis\u00e9rables, Les: A Film (1995)", ("Drama", "Musical")),),
    ),
    Public(
        "MovieLens 10M",
        "ratings.dat",
        "1::122::5::838985046\n1::185::4.5::838983525\n",
        "",
        (("1", "122", "rating", 5.0), ("1", "185", "rating", 4.5)),
        (838985046, 838983525),
        "movies.dat",
        "122::Am\u00e9lie (2001)::Comedy\n",
        "",
        (("122", "Am\u00e9lie (2001)", ("Comedy",)),),
    ),
    Public(
        "MovieLens 32M",
        "ratings.csv",
        "userId,movieId,rating,timestamp\n1,17,4.0,944249077\n1,25,1.0,944250228\n",
        "",
        (("1", "17", "rating", 4.0), ("1", "25", "rating", 1.0)),
        (944249077, 944250228),
        "movies.csv",
        'movieId,title,genres\n17,"Sense, and ""Sensibility"" (1995)",Drama|Romance\n25,X,(no genres listed)\n',
        "",
        (("17", 'Sense, and "Sensibility" (1995)', ("Drama", "Romance")), ("25", "X", ())),
    ),
    Public(
        "RecBole",
        "steam.inter",
        'user_id:token\titem_id:token\ttimestamp:float\n"ann"\t5\t1.5e9\n',
        "",
        (('"ann"', "5", "view", None),),
        (1500000000,),
        "steam.item",
        "item_id:token\ttitle:token_seq\tgenres:token_seq\n5\tA game\tAction Indie\n",
        "",
        (("5", "A game", ("Action", "Indie")),),
    ),
    Public(
        "Amazon 2014",
        "reviews_Beauty_5.json.gz",
        gzip.compress(_lines(_REVIEW_2014).encode()),
        "--columns user=reviewerID,item=asin,time=unixReviewTime,value=overall",
        (("A2SUAM1J3GNN3B", "0000013714", "view", 5.0),),
        (1252800000,),
        "meta_Beauty.json.gz",
        gzip.compress(
            _python(
                {
                    "asin": "0000013714",
                    "title": 'It\'s a "hymnal"',
                    "categories": [["Books", "Music"]],
                    "salesRank": {"Books": 5},
                    "related": {"also_bought": ["B1"]},
                },
                {"asin": "0000013715", "price": 3.5, "imUrl": "http://x", "categories": [["Books"]]},
            ).encode()
        ),
        "--catalog-columns item=asin",
        (("0000013714", 'It\'s a "hymnal"', ("Books", "Music")), ("0000013715", "", ("Books",))),
    ),
    Public(
        "Amazon 2014, ratings",
        "ratings_Beauty.csv",
        "A39HTATAQ9V7YF,0205616461,5.0,1369699200\nA3JM6GV9MNOF9X,0558925278,3.0,1355443200\n",
        "--columns user=1,item=2,value=3,time=4",
        (("A39HTATAQ9V7YF", "0205616461", "view", 5.0), ("A3JM6GV9MNOF9X", "0558925278", "view", 3.0)),
        (1369699200, 1355443200),
    ),
    Public(
        "Amazon 2018",
        "All_Beauty.json.gz",
        gzip.compress(
            _lines(
                {**_REVIEW_2014, "verified": True, "style": {"Size:": " 4"}, "vote": "7"},
                {**_REVIEW_2014, "asin": "B1", "image": ["http://x"]},
            ).encode()
        ),
        "--columns user=reviewerID,item=asin,time=unixReviewTime,value=overall",
        (("A2SUAM1J3GNN3B", "0000013714", "view", 5.0), ("A2SUAM1J3GNN3B", "B1", "view", 5.0)),
        (1252800000, 1252800000),
        "meta_All_Beauty.json.gz",
        gzip.compress(
            _lines(
                {
                    "category": ["Beauty", "Hair"],
                    "tech1": "",
                    "description": ["a", "b"],
                    "title": "A comb",
                    "rank": ["1 in x"],
                    "details": {"a": "b"},
                    "asin": "B1",
                },
                {"category": [], "title": "B", "rank": "2 in y", "details": [], "asin": "B2"},
            ).encode()
        ),
        "--catalog-columns item=asin,text=title,categories=category",
        (("B1", "A comb", ("Beauty", "Hair")), ("B2", "B", ())),
    ),
    Public(
        "Amazon 2018, ratings",
        "All_Beauty.csv",
        "0143026860,A1V6B6TNIC10QE,1.0,1424304000\n",
        "--columns item=1,user=2,value=3,time=4",
        (("A1V6B6TNIC10QE", "0143026860", "view", 1.0),),
        (1424304000,),
    ),
    Public(
        "Amazon 2023",
        "All_Beauty.jsonl.gz",
        gzip.compress(_lines(_REVIEW_2023).encode()),
        "--columns item=parent_asin",
        _AMAZON_2023,
        (1588687728,),
        "meta_All_Beauty.jsonl.gz",
        gzip.compress(_META_2023.encode()),
        "--catalog-columns item=parent_asin,text=title",
        _BRUSH,
    ),
    Public(
        "Amazon 2023, ratings",
        "All_Beauty.csv.gz",
        gzip.compress(
            b"user_id,parent_asin,rating,timestamp\nAGKHLEW2SOWHNMFQIJGBECAF7INQ,B00YQ6X8EP,4.0,1588687728923\n"
        ),
        "--columns item=parent_asin",
        _AMAZON_2023,
        (1588687728,),
    ),
    Public(
        "Yelp",
        "yelp_academic_dataset_review.json",
        _lines(
            {
                "review_id": "K",
                "user_id": "mh_-eMZ6K5RLWhZyISBhwA",
                "business_id": "XQfwVwDr-v0ZS3_CbbE5Xw",
                "stars": 3.0,
                "useful": 0,
                "text": "If you decide to eat here,\nbe aware \U0001f600",
                "date": "2018-07-07 22:09:11",
            }
        ),
        "--columns item=business_id,time=date,value=stars",
        (("mh_-eMZ6K5RLWhZyISBhwA", "XQfwVwDr-v0ZS3_CbbE5Xw", "view", 3.0),),
        (1531001351,),
        "yelp_academic_dataset_business.json",
        _lines(
            {
                "business_id": "XQfwVwDr-v0ZS3_CbbE5Xw",
                "name": "Turning Point",
                "attributes": {"Wifi": "u'free'"},
                "categories": "Restaurants, Food",
                "hours": {"Monday": "7:0-15:0"},
            },
            {"business_id": "b2", "name": "X", "attributes": None, "categories": None, "hours": None},
        ),
        "--catalog-columns item=business_id,text=name",
        (("XQfwVwDr-v0ZS3_CbbE5Xw", "Turning Point", ("Restaurants, Food",)), ("b2", "X", ())),
    ),
    Public(
        "Retailrocket",
        "events.csv",
        "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,view,355908,\n"
        "1433222276276,257598,transaction,5206,4000\n",
        "--columns user=visitorid",
        (("257597", "355908", "view", None), ("257598", "5206", "transaction", None)),
        (1433221332, 1433222276),
    ),
    Public(
        "H&M",
        "transactions_train.csv",
        "t_dat,customer_id,article_id,price,sales_channel_id\n2018-09-20,000058a12d5b43e6,0663713001,0.0508,2\n",
        "--columns user=customer_id,item=article_id,time=t_dat",
        (("000058a12d5b43e6", "0663713001", "view", None),),
        (1537401600,),
        "articles.csv",
        "article_id,product_code,prod_name,product_group_name,detail_desc\n"
        '0663713001,0663713,"Strap top, 5"" straps",Garment Upper body,"Jersey top\nwith straps, long"\n',
        "--catalog-columns item=article_id,text=prod_name,categories=product_group_name",
        (("0663713001", 'Strap top, 5" straps', ("Garment Upper body",)),),
    ),
    Public(
        "Kaggle, multi-category shop",
        "2019-Oct.csv",
        "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n"
        "2019-10-01 00:00:00 UTC,view,44600062,2103807459595387724,,shiseido,35.79,541312140,72d76fde\n",
        "--columns item=product_id,time=event_time",
        (("541312140", "44600062", "view", None),),
        (1569888000,),
    ),
    Public(
        "Taobao",
        "UserBehavior.csv",
        "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n",
        "--columns user=1,item=2,kind=4,time=5",
        (("1", "2268318", "pv", None), ("1", "2333346", "buy", None)),
        (1511544070, 1511561733),
    ),
    Public(
        "Yoochoose",
        "yoochoose-clicks.dat",
        "1,2014-04-07T10:51:09.277Z,214536502,0\n1,2014-04-07T10:54:09.868Z,214536500,S\n",
        "--columns user=1,time=2,item=3",
        (("1", "214536500", "view", None), ("1", "214536502", "view", None)),
        (1396868049, 1396867869),
    ),
    Public(
        "Diginetica",
        "train-item-views.csv",
        "sessionId;userId;itemId;timeframe;eventdate\n1;NA;81766;526309;2016-05-09\n1;NA;31331;1031018;2016-05-09\n",
        "--separator ';' --columns user=sessionId,time=eventdate",
        (("1", "31331", "view", None), ("1", "81766", "view", None)),
        (1462752000, 1462752000),
        "products.csv",
        "itemId;pricelog2;product.name.tokens\n81766;10;4875,776,56689\n",
        "--catalog-separator ';' --catalog-columns item=itemId,text=product.name.tokens",
        (("81766", "4875,776,56689", ()),),
    ),
    Public(
        "Last.fm 1K",
        "userid-timestamp-artid-artname-traid-traname.tsv",
        'user_000001\t2009-05-04T23:08:57Z\tf1b1cf71\tDeep Dish\t\t"Open Air" (Live 5" Mix)\n'
        "user_000001\t2009-05-04T13:54:10Z\ta7f7df4a\t\u5742\u672c\t9f\tComposition\n",
        "--columns user=1,time=2,item=6",
        (
            ("user_000001", '"Open Air" (Live 5" Mix)', "view", None),
            ("user_000001", "Composition", "view", None),
        ),
        (1241478537, 1241445250),
    ),
    Public(
        "KuaiRec",
        "big_matrix.csv",
        "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
        "0,3649,13838,10867,2020-07-05 00:08:23.438,20200705,1593878903.438,1.273396521\n",
        "--columns item=video_id,time=timestamp,value=watch_ratio",
        (("0", "3649", "view", pytest.approx(1.2734, abs=1e-4)),),
        (1593878903,),
        "kuairec_caption_category.csv",
        "video_id,manual_cover_text,caption,topic_tag,first_level_category_id,first_level_category_name\n"
        '3649,UNKNOWN,"\u7cbe\u795e\u5c0f\u4f19\n\u8def, \u96be\u8d70",[],8,\u989c\u503c\n',
        "--catalog-columns item=video_id,text=caption,categories=first_level_category_name",
        (("3649", "\u7cbe\u795e\u5c0f\u4f19\n\u8def, \u96be\u8d70", ("\u989c\u503c",)),),
    ),
    Public(
        "Goodreads",
        "goodreads_interactions_poetry.json.gz",
        gzip.compress(
            _lines(
                {
                    "user_id": "8842281e",
                    "book_id": "24375664",
                    "review_id": "5cd4",
                    "is_read": True,
                    "rating": 5,
                    "date_added": "Fri Aug 25 13:55:02 -0700 2017",
                    "read_at": "",
                }
            ).encode()
        ),
        "--columns item=book_id,time=date_added --time-format '%a %b %d %H:%M:%S %z %Y'",
        (("8842281e", "24375664", "view", 5.0),),
        (1503694502,),
        "goodreads_books_poetry.json.gz",
        gzip.compress(
            _lines(
                {
                    "book_id": "948",
                    "title": "W",
                    "popular_shelves": [{"count": "3", "name": "x"}],
                    "series": [],
                }
            ).encode()
        ),
        "--catalog-columns item=book_id",
        (("948", "W", ()),),
    ),
]


def _given(options: str, prefix: str = "") -> tuple[str | None, dict[str, str], Layout]:
    """Form of times, columns and layout, as a command line has them."""
    words = shlex.split(options)
    given = {
        name.removeprefix(f"--{prefix}"): value for name, value in zip(words[::2], words[1::2], strict=True)
    }
    columns = column_mapping(given.get("columns"), f"--{prefix}columns")
    return given.get("time-format"), columns, Layout(given.get("separator"))


@pytest.mark.parametrize("public", PUBLIC, ids=lambda each: each.name)
def test_a_public_layout_is_read_with_the_options_of_the_page(tmp_path: Path, public: Public) -> None:
    for options in filter(None, (public.options, public.catalog_options)):
        assert f"`{options}`" in DOCUMENT
    times, columns, layout = _given(public.options)
    log = scan_log(
        write(tmp_path / public.log, public.content), columns=columns, layout=layout, time_format=times
    )
    frame = log.tidied().collect()
    rows = sorted(frame.rows(), key=lambda row: row[:2])
    assert [(row[0], row[1], row[3], row[4]) for row in rows] == list(public.wanted)
    if public.times is not None:
        assert tuple(row[2] for row in rows) == public.times
    if public.catalog:
        _, columns, layout = _given(public.catalog_options, "catalog-")
        catalog = read_catalog(write(tmp_path / public.catalog, public.items), "auto", columns, layout)
        found = tuple(zip(catalog.ids, catalog.texts, catalog.categories, strict=True))
        assert found == public.catalog_wanted


_BEHAVIORS = (
    "1\tU13740\t11/11/2019 9:05:58 AM\tN55189 N42782\tN55689-1 N35729-0\n"
    "2\tU91836\t11/12/2019 6:11:30 PM\tN31739\tN20678-0 N39317-0 N58114-1\n"
)
CONVERTED = [
    (
        "MIND",
        {"behaviors.tsv": _BEHAVIORS},
        "clicks.parquet",
        [("U13740", "N55689", 1573463158), ("U91836", "N58114", 1573582290)],
    ),
    (
        "Tmall",
        {
            "user_log_format1.csv": "user_id,item_id,cat_id,time_stamp,action_type\n"
            "328862,323294,833,829,0\n1,2,3,1111,2\n"
        },
        "events.parquet",
        [("1", "2", 1447200000), ("328862", "323294", 1440806400)],
    ),
]


def _code_for(name: str) -> str:
    return re.findall(rf"\*\*{name}.*?```python\n(.*?)```", DOCUMENT, re.DOTALL)[0]


@pytest.mark.parametrize(
    ("name", "files", "made", "wanted"), CONVERTED, ids=lambda each: each if isinstance(each, str) else ""
)
def test_what_is_to_be_converted_is_read_after_the_code_of_the_page(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    files: dict[str, str | bytes],
    made: str,
    wanted: list[tuple[str, str, int]],
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content in files.items():
        write(tmp_path / file, content)
    exec(_code_for(name), {})
    assert events(tmp_path / made) == wanted


def test_minds_lists_are_refused_by_column_and_type_and_its_news_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "behaviors.tsv", _BEHAVIORS)
    message = refusal(path, "user=2,time=3,item=5")
    assert "column '5' (for item) holds several ids, as text" in message
    assert "N55689" not in message
    news = 'N88753\tlifestyle\troyals\t"Wheel" guest: The Brands\tShop\thttps://x\t[{}]\t[]\nN19639\thealth\tx\tY\tZ\th\t[]\t[]\n'
    options = "--catalog-columns item=1,categories=2,text=4"
    assert f"`{options}`" in DOCUMENT
    catalog = read_catalog(write(tmp_path / "news.tsv", news), columns=_given(options, "catalog-")[1])
    assert catalog.texts == ('"Wheel" guest: The Brands', "Y")


def test_goodreads_log_without_times_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "goodreads_interactions.csv", "user_id,book_id,is_read,rating,is_reviewed\n0,948,1,5,0\n"
    )
    assert "has no column for time" in refusal(path, "item=book_id")


def test_retailrockets_properties_become_a_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part in (1, 2):
        text = f"timestamp,itemid,property,value\n14,{part},categoryid,13\n14,{part},888,n5\n15,{part},categoryid,7\n"
        write(tmp_path / f"item_properties_part{part}.csv", text)
    exec(_code_for("Retailrocket"), {})
    catalog = read_catalog(tmp_path / "items.csv")
    assert sorted(zip(catalog.ids, catalog.texts, strict=True)) == [("1", "7"), ("2", "7")]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1 2 3|4|5 6", "several ids"),
        ("1,2;3|9|4,5", "several ids"),
        ("N1-1 N2-0|N3-1|N4-1 N5-0 N6-0", "several ids"),
        ("[1, 2]|[3]|[]", "lists"),
        ("['a', 'b']|['c']|['d']", "lists"),
        ("{1, 2}|{3, 4}|{5, 6}", "lists"),
    ],
)
def test_baskets_as_text_are_refused(tmp_path: Path, text: str, what: str) -> None:
    lines = "".join(f"u\t{field}\t1500000000\n" for field in text.split("|"))
    message = refusal(write(tmp_path / "log.tsv", "user\titem\ttime\n" + lines))
    assert f"column 'item' (for item) holds {what}, as text" in message


@pytest.mark.parametrize(
    "ids",
    [
        ["a b", "c d", "e"],
        ["12 345", "67 890", "11 222"],
        ["{3F2504E0-4F89-11D3-9A0C-0305E82C3301}", "{3F2504E0-4F89-11D3-9A0C-0305E82C3302}", "x"],
        ["Song 2", "99 Problems", "A Day in the Life"],
        ["1", "2", "3 4 5"],
        ["urn:item:1", "http://x/1", "1/2"],
    ],
)
def test_ids_with_blanks_are_no_baskets(tmp_path: Path, ids: list[str]) -> None:
    lines = "".join(f"u\t{each}\t1500000000\n" for each in ids)
    assert len(events(write(tmp_path / "log.tsv", "user\titem\ttime\n" + lines))) == 3
