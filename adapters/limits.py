"""How large the parts of an adapter may be; docs/format.md lists the same numbers.

They are far above what training gives, and low enough that a hostile file costs little to refuse.
"""

MIB = 1024 * 1024

MAX_ADAPTER_BYTES = 16 * 1024 * MIB  # one weights file; rank 512 on a 70B model has 7 GB
MAX_HEADER_BYTES = 6 * MIB  # 40,000 tensors of a mixture of experts
MAX_JSON_BYTES = 4 * MIB  # adapter_config.json, rora.json
MAX_TEXT_BYTES = 16 * MIB  # README.md, report.html
MAX_TEMPLATE_BYTES = MIB  # chat_template.jinja
# Values and containers of one JSON text. An empty list takes two bytes of a file and 64 of memory.
MAX_JSON_VALUES = 500_000
MAX_JSON_DEPTH = 100
MAX_UNESCAPED_BYTES = MIB  # of JSON with characters beyond ASCII, which take four bytes each
MAX_TENSORS = 40_000
MAX_DIMENSIONS = 8
MAX_NAME_LENGTH = 512  # of a tensor
MAX_READ_RANK = 4096  # what is looked at with matrices of [rank, rank]
MAX_LORA_RANK = 512  # what vLLM's configuration can be told, and so what is served
MAX_PATTERN_LENGTH = 1000
MAX_EXPRESSIONS = 500  # keys of a pattern that are not just the end of a module's path
# Steps that matching all patterns of an adapter may take: about a second at worst.
MAX_PATTERN_STEPS = 100_000_000
# Far above what training gives (hundreds), far below what overflows float32 on its way through a
# model. Overflow is not the adapter's problem alone: not-a-number in the key-value cache stays in
# its blocks and reaches whoever gets them next.
MAX_DELTA_BOUND = 1e6

MAX_PROBE_PROMPTS = 16
MAX_PROBE_PROMPT_TOKENS = 256
MAX_PROBE_ANSWER_TOKENS = 8
# Of a log-prob; training gives hundreds at most.
MAX_PROBE_NATS = 1e6

MAX_ARCHIVE_MEMBERS = 1000
# Uncompressed bytes for each compressed one. Factors hardly compress; what a bomb repeats does.
MAX_ARCHIVE_RATIO = 100
# Below this the ratio says nothing.
ARCHIVE_RATIO_FROM_BYTES = 16 * MIB
