"""Names that files, folders, classes and runs may have, and that terminals, rich, matplotlib or codecs misread."""

MARKUP = ["exp[lr=1e-3]", "exp[lr=1e-4]", "[/b]", "[bold red]x", "[link=http://a]b[/link]", ":smile:", "\\[b]"]

FORMULAS = ["$x_1$", "$", "a$b$c$", "$\\frac{1}{$", "\\$5", "x_1^2", "_hidden", "\\alpha", "%", "{}", "$$"]

CONTROL = [
    "\x1b[31mred\x1b[0m",
    "a\rb",
    "two\nlines",
    "tab\there",
    "bell\x07",
    "\x9b31m",
    "photo\u202egnp.exe",
    "\u2028",
]

BYTES = ["caf\udce9", "\udcff\udcfe", "\ud800"]

OTHER = ["猫", "été", "🐈", "a" * 300, " ", "..", "-x", "#1", "a/b\\c", "'\"`", "\u0301", "\U0010ffff"]

NAMES = MARKUP + FORMULAS + CONTROL + BYTES + OTHER
