"""Strings on which two tokenizers show whether they are the same: every script, code, spaces, digits, odd characters.

All of them are NFC: llama.cpp normalises nothing, so a text that is not NFC is cut otherwise there than by a tokenizer
that normalises first (Qwen's, for one), whatever the file says. Combining marks that no composed letter holds are in.
"""

import itertools
from collections.abc import Iterable

SCRIPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Fünf große Äpfel fielen, während Jürgen schlief; ÜBERRASCHUNG im STRAẞENCAFÉ.",
    "Où êtes-vous allés, là-bas, l'été dernier ? Ça coûte 3,50 €. ÉCOLE PRIMAIRE",
    "El niño comió piñas, ¿verdad? ¡Sí! AÑO NUEVO",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. ŽLUŤOUČKÝ",
    "Zażółć gęślą jaźń. ŁÓDŹ",
    "İstanbul'da ışıl ışıl bir gün, Iğdır'dan.",
    "Tôi yêu tiếng Việt rất nhiều.",
    "Съешь же ещё этих мягких французских булок. МОСКВА, Київ, ЇЖАК",
    "нещо на Български",
    "Η γρήγορη αλεπού πηδάει. ΑΘΉΝΑ",
    "שָׁלוֹם עֲלֵיכֶם, מה שלומך?",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣٤٥",
    "این یک جملهٔ فارسی است. نمی‌خواهم ۱۲۳",
    "नमस्ते दुनिया, आप कैसे हैं? १२३४",
    "হ্যালো বিশ্ব, কেমন আছো?",
    "வணக்கம் உலகம்",
    "హలో ప్రపంచం",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "ສະບາຍດີຊາວໂລກ",
    "កាន់តែពិសេសអាច",
    "မင်္ဂလာပါ ကမ္ဘာလောက",
    "გამარჯობა მსოფლიო ᲡᲐᲥᲐᲠᲗᲕᲔᲚᲝ",
    "Բարեւ աշխարհ",
    "ሰላም ልዑል",
    "我想在apple工作1314151天～",
    "天地玄黃,宇宙洪荒。日月盈昃，辰宿列張。",
    "これは日本語の文章です。カタカナとひらがな、漢字123。",
    "안녕하세요 세계, 잘 지내요? ㅋㅋㅋ",
    "ᚠᛇᚻ᛫ᛒᛦᚦ ᎣᏏᏲ 𐐔𐐯𐑅𐐨𐑉𐐯𐐻 𓀀𓀁",
    "𠀀𠀁 㐀㐁 豈更",
)
CODE = (
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    'for(int i=0;i<10;++i){\n\tprintf("%d\\n", i);\n}',
    "#include <stdio.h>\r\nint main(void) { return 0; }\r\n",
    "SELECT * FROM t WHERE a >= 1.5e-3 AND b != 'x';",
    '{"key": [1, 2, {"a": null}], "b": true}',
    '<div class="a b"><p>Text &amp; more</p></div>',
    "x = (a+b)*[c-d]/{e%f}; y |= ~z ^ (w << 3) && !v || u",
    "camelCaseWordsAND_SNAKE_CASE HTTPServerError iPhone14Pro XMLHttpRequest",
    "https://example.com/path?query=1&b=2#frag user.name+tag@mail.example.org",
    "$ ls -la | grep '^d' > /tmp/out.txt 2>&1",
    "\\frac{a}{b} = \\int_0^\\infty e^{-x^2} dx",
    "if (a) {\n\n\n    b();\n\n}\n// end/path/\n",
    "\tindented\n\t\ttwice\n    four\n        eight\n",
    "--flag=value -x /usr/bin/env:*.py !!! ... --- === ___ ***",
    "......!!!!!!?????? ''''''```````\"\"\"\"",
    "a/b//c///d\\e\\\\f/\n/\n//\r\n",
)
DIGITS = (
    *("3" * n for n in range(1, 12)),
    "3 33 333 3333 33333",
    "3.3 3..3 3...3 1,234,567.89",
    "in 1999 and 2024, 12345678901234567890 times",
    "a1b22c333d4444 007 0x1F 1e10 ½ ² ³ Ⅷ ① １２３４",
    " 1 12 123 1234",
    "v1.2.3-rc4 +49-30-1234567",
    "1\n22\n333\n4444\n",
)
CONTRACTIONS = (
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL",
    "don't DON'T can't CAN'T we're WE'RE I'm I'M she'd SHE'D",
    "it’s ‘quoted’ “text” l'homme d'or 's 't 're 've 'm 'll 'd 'S 'T",
    "'sun 'tis 'reel 'vest 'mud 'llama 'dog x's's",
    "Ali'nin Ankara'dan 5'te rock'n'roll",
    "ſ 'ſ 'ſun I'ſ K 'K",
)
SPACES = (
    *(" " * n for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64)),
    *("\n" * n for n in range(1, 6)),
    *("\t" * n for n in range(1, 5)),
    *(f"a{' ' * n}b" for n in range(1, 9)),
    *(f"a{chr(10) * n}b" for n in range(1, 5)),
    *(f"{' ' * n}a" for n in range(1, 5)),
    *(f"a{' ' * n}" for n in range(1, 5)),
    *(f"{' ' * n}.{' ' * n}!" for n in range(1, 4)),
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n",
    "a \n b  \n  c\t\n\td \r\n e\r f\r\n\r\ng",
    " \r\n \r\n",
    "x \n",
    "x\n ",
    "end.\n\nNext",
    "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g\u200bh\ufeffi",
    "\u00a0\u00a0 \u3000 \u3000",
    "\x0b \x0c \x1c \x1f",
)
EMOJI = (
    "🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅ 🦙🦙",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️ ☕️ 1️⃣",
    "😀😃😄😁 text😀text 😀 text",
    "→ ← ⇒ ∀x∈ℝ: ⌈x⌉ ≥ x ∑∏√ ≈≠≤ ★☆♫",
    "© ® ™ § ¶ † ‡ • … ‰ ′ ″ ¬ ¦ ¨ ´ ¸ ° µ",
    "₿ ¥ £ € ¢ ₹ $5 +$ ^^ `a` ~b~ |c| <d> =e=",
)
ODD = (
    "q̃ x̌ m̥ l̩ a̱b̲c̳ x̧̌",
    "q̃uick Q̃ UICK x̌YZ",
    "\u0301leading mark \u0300\u0301\u0302",
    "Z͑ͫ̓ͪ̂A̴̵̜̰͔ͫL̠ͨͧͩG̴̻͈͍O̵̹̻̝̳",
    "\x00\x01\x02\x7f\x80\x9f",
    "\ufffd \ufffe \uffff \U0010ffff \ue000 \U000f0000",
    "ǅ ǈ ǋ ᾼ Ǆungla ʰʱ ªº ﬁﬂ ﷺ",
    "ＦＵＬＬ ｗｉｄｔｈ ！？ 、。",
    "\u202eright to left\u202c \u2066iso\u2069 soft\u00adhyphen",
    "a\u200db \u200c \u2060",
    "ÀÁÂ àáâ ÀaÁbÂc aÀbÁ ДаНет дАнЕТ",
    "word" * 40,
    "a" * 100,
    "ab" * 50,
    "aAaA" * 10,
    "=" * 50,
    "-=" * 20,
    "é" * 33,
    "的" * 20,
    "\U0001f999" * 9,
)
WORDS = ("a", "A", "Ab", "é", "É", "的", "7", "77", ".", "'s", "!?", "😀", "\u0303", "_", "/")
JOINTS = ("", " ", "\n")
PROBES: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *SCRIPTS,
            *CODE,
            *DIGITS,
            *CONTRACTIONS,
            *SPACES,
            *EMOJI,
            *ODD,
            *(
                f"{left}{JOINTS[i % 3]}{right}"
                for i, (left, right) in enumerate(itertools.product(WORDS, WORDS))
                if left != right and not (left in "aAAbéÉ" and right == "\u0303")
            ),
        )
    )
)


def special_probes(special: Iterable[str]) -> tuple[str, ...]:
    """Strings around the special tokens of one tokenizer: alone, in a text, doubled, beside spaces and newlines."""
    return tuple(
        text
        for token in special
        for text in (token, f"a{token}b", f"a {token} b", f"{token}{token}", f"{token}\n{token}\na", f"a\n{token}")
    )
