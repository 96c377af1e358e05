"""
Text to token ids. Writes data/<dataset>/{train.bin, val.bin, meta.json, tokenizer.json; for chats .mask}, all that a run reads.

    python prepare.py config/stdlib.py                              # the source of this Python's standard library: no download
    python prepare.py config/shakespeare.py                         # one text of 1 MB; its last tenth is the validation split
    python prepare.py config/shakespeare_classic.py                 # the same text with bytes as tokens, in its own folder
    python prepare.py --dataset=notes --input=notes/,diary.jsonl    # your own .txt .md .py .jsonl files and folders
    python prepare.py --dataset=chat --input=chat.jsonl             # conversations, instructions, preference pairs: see parse
    python prepare.py --dataset=tinystories --vocab_size=8192       # 2.2 GB of stories (Eldan and Li 2023, arXiv:2305.07759)
    python prepare.py config/gpt2_124m.py --num_shards=10           # FineWeb as GPT-2 tokens, 100M of them per shard

Files are cut into spans, and spans are grouped into units of about 2 MB, which the cores work on in parallel. A first pass hashes
every document, to find duplicates and choose the validation split. The tokenizer learns from the training split. A second pass
encodes one unit after another and appends it to the bins in data/<dataset>/.partial-<hash of text and knobs>, where state.json
records how far they are, so that a killed run continues from there. The output depends only on the text and the knobs.
A document is a file, or a line of .jsonl; <|endoftext|> in it is ordinary text. Of equal documents one is kept, so naming a file
twice does not give it more weight.
"""
import collections, contextlib, dataclasses, functools, glob, hashlib, importlib.util, itertools, json, os, re, shutil, \
    sys, sysconfig, time
from os.path import basename, exists, join
import numpy as np
import bpe, config
from bpe import ENDOFTEXT, Tokenizer, progress, write
from config import require

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"      # the shards of modded-nanogpt
HUB = "https://huggingface.co/openai-community/"
GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
BUILT_IN = ("stdlib", "shakespeare", "tinystories", "fineweb")      # no _ in a name, see built_in
STDLIB_SKIP = ("test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages",
               "encodings")       # 72 tables, nearly the same: a quarter of the validation split would be like the training split
ENDINGS = (".txt", ".md", ".py", ".jsonl")
UNIT = 2 << 20              # bytes of text per unit of work: enough to vectorise, little enough to spread evenly over the cores
SAVE = 1.0                  # seconds between two updates of state.json
SPLITS = ("train", "val")
FILES = ("train.bin", "val.bin", "train.mask", "val.mask")
TRAIN, VAL, DROP, FREE = range(4)   # the fate of a document; FREE: its hash will decide

# ---- files and downloads -------------------------------------------------------------------------------------------------
def size_of(path): return os.path.getsize(path) if exists(path) else 0

def sha256(path):
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()

def need_space(folder, size):
    free = shutil.disk_usage(folder).free
    if size > free: raise ValueError(f"{folder} needs about {size / 1e6:,.1f} MB, only {free / 1e6:,.1f} MB are free: make room")

def fetch(url, path, sha="", stall=30, tries=5, wait=1.0):
    """Download url to path unless it exists; -> path. Resumes where it stopped (HTTP Range), retries after `wait` * 1, 2, 4...
    seconds, gives up after `tries` attempts in a row without a new byte; `stall` seconds of silence end an attempt. Length and
    sha256 (the given one, or the hub's in its header X-Linked-Etag) are checked before the file gets its name; an existing file
    that differs from a given sha256 is used, with a note. Two processes at once are safe, but both download."""
    def fail(why):
        raise ValueError(f"cannot download {url}: {why}. Put the file at {path} by hand (config/stdlib.py needs no download)")
    if exists(path):
        if sha and sha256(path) != sha: print(f"note: {path} is not {url}; it is used, delete it to download that")
        return path
    import requests
    part, failures = path + ".part", 0
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while True:
        have = size_of(part)
        ask = {"Accept-Encoding": "identity", "Range": f"bytes={max(have - 1, 0)}-"}    # a byte twice: never an empty range
        try:
            with requests.get(url, headers=ask, stream=True, timeout=(10, stall)) as r:
                if r.status_code in (401, 403, 404, 410): fail(f"the server says {r.status_code} {r.reason}")
                if r.status_code == 416 and have: os.remove(part)                       # it is longer than the file: start over
                r.raise_for_status()
                tags = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in (*r.history, r)]
                sha = sha or next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), "")
                sent = r.status_code == 206 and re.fullmatch(r"bytes (\d+)-\d+/(\d+)", r.headers.get("Content-Range", ""))
                at, total = map(int, sent.groups()) if sent else (0, int(r.headers.get("Content-Length") or 0))
                if at > have or r.status_code == 206 and not sent: fail("the server sent another range than the one requested")
                need_space(os.path.dirname(path), total - at)
                add = progress(f"download {basename(path)}", total - at)
                with open(part, "r+b" if have else "wb", buffering=0) as f:
                    f.truncate(f.seek(at))
                    for block in r.iter_content(1 << 13): add(f.write(block))
                    os.fsync(f.fileno())
            if total and size_of(part) != total: raise OSError(f"{size_of(part):,} of {total:,} bytes arrived")
            if not sha or (found := sha256(part)) == sha:
                os.replace(part, path)
                return path
            os.remove(part)
            if not have: fail(f"its sha256 is {found}, not {sha}")                      # only a resumed file gets a clean retry
        except OSError as e:                                                            # requests' exceptions are OSErrors, too
            failures = 1 if size_of(part) > have else failures + 1                      # new bytes reset the count
            why = str(getattr(e.args[0], "reason", e) if e.args else e)[:150]           # urllib3 keeps the cause in "reason"
            if failures >= tries: fail(why)
            print(f"the download of {basename(path)} broke off ({why}): trying again", file=sys.stderr)
            time.sleep(min(wait * 2 ** (failures - 1), 60))

# ---- models and tokenizers -----------------------------------------------------------------------------------------------
def pretrained(init_from, files=("config.json", "model.safetensors", "tokenizer.json")):
    """The Hugging Face folder that init_from names; GPT-2's files are downloaded to data/hf/<name>. "" for scratch and resume."""
    if init_from in ("scratch", "resume"): return ""
    folder = join("data", "hf", init_from) if init_from in GPT2 else init_from
    if init_from in GPT2:                                                       # check before downloading 500 MB, not after
        require(importlib.util.find_spec("safetensors"), f"init_from={init_from!r} needs safetensors: pip install safetensors")
        for name in files:
            fetch(f"{HUB}{init_from}/resolve/main/{name}", join(folder, name))
    make = "sample.py --export=FOLDER makes one from a run, hf download NAME --local-dir=FOLDER gets one"
    names = f"none of scratch, resume, {', '.join(GPT2)}, and no folder"
    require(os.path.isdir(folder), f"init_from={init_from!r} is {names} ({make})")
    require(exists(join(folder, files[-1])), f"{folder} is not a Hugging Face folder: it has no {files[-1]} ({make})")
    return folder

def own_tokenizer(cfg):
    """cfg with the tokenizer of the model that init_from names: ids of any other would mean nothing to that model."""
    folder = pretrained(cfg.init_from)
    if not folder or cfg.init_from in GPT2 and cfg.tokenizer == "gpt2": return cfg
    # vocab_size: the most that uint16 can hold, so any tokenizer passes here; train.py checks it against the model
    return dataclasses.replace(cfg, tokenizer=join(folder, "tokenizer.json"), vocab_size=65536)

def check_vocab(cfg, size):
    if size > 65536: raise ValueError(f"the tokenizer has {size} tokens, uint16 holds 65536 ids: use a smaller tokenizer")
    if size > cfg.vocab_size: raise ValueError(f"the tokenizer has {size} tokens: set --vocab_size={size} or more")

# ---- files -> spans -> documents -----------------------------------------------------------------------------------------
# Bytes start to stop of a file. kind: text (one document or a part of one), single (the same, if it is the only text), jsonl and
# stories (many documents), tokens (FineWeb's). fate: TRAIN, VAL or FREE. last: the span ends a document.
Span = collections.namedtuple("Span", "path start stop kind fate last")
MANY = ("jsonl", "stories")

# Where `cut` may cut a file of each kind: an offset into a window of its bytes; 0 or None if there is no place.
PLACE = {"text": lambda window: bpe.last_place(window[:1024]), "single": lambda window: bpe.last_place(window[:1024]),
         "jsonl": lambda window: window.find(b"\n") + 1, "tokens": lambda window: 2,    # after any token, of two bytes
         "stories": lambda window: (m := re.search(rb"\n<\|endoftext\|>\r?\n", window)) and m.end()}

def walk(root, endings=ENDINGS, skip=()):
    found = []
    def refuse(error): raise error      # by default os.walk skips a folder that it cannot read
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [d for d in folders if not d.startswith((".", "__pycache__")) and d not in skip]
        found += [join(folder, name) for name in names if name.lower().endswith(endings) and not name.startswith(".")]
    return sorted(filter(os.path.isfile, found))        # no pipes, no broken links

def built_in(cfg):
    """The built-in text that the dataset is made of, or "": shakespeare_char is shakespeare, prepared in a second way."""
    name = cfg.dataset.partition("_")[0]
    return name if name in BUILT_IN else ""

def sources(cfg):
    """Spans that cover the files to read, in order. Missing files of a built-in text are downloaded to data/<its name>."""
    name, folder = built_in(cfg), join("data", built_in(cfg))
    def span(path, kind, fate=FREE, start=0): return Span(path, start, size_of(path), kind, fate, True)
    if name == "fineweb":           # a shard: 256 int32 (20240520, version 1, number of tokens, zeros), then the tokens as uint16
        paths = [join(folder, f"fineweb_{'train' if n else 'val'}_{n:06d}.bin") for n in range(cfg.num_shards + 1)]
        os.makedirs(folder, exist_ok=True)
        need_space(folder, 4e8 * sum(not exists(path) for path in paths))       # 200 MB a shard, twice: the bins
        for path in paths:
            fetch(FINEWEB + basename(path), path)
            head, size = np.fromfile(path, "<i4", 256).tolist(), size_of(path)
            if head[:2] != [20240520, 1] or size != 1024 + 2 * head[2] or np.memmap(path, "<u2", "r", 1024).max() > 50256:
                raise ValueError(f"{path} is not a whole shard of GPT-2 tokens: delete it to download it again")
        return [span(path, "tokens", TRAIN if n else VAL, 1024) for n, path in enumerate(paths)]
    if name == "tinystories":                               # validation first: a story in both splits stays there
        files = ("TinyStoriesV2-GPT4-valid.txt", VAL), ("TinyStoriesV2-GPT4-train.txt", TRAIN)
        return [span(fetch(TINYSTORIES + file, join(folder, file)), "stories", fate) for file, fate in files]
    items = [item for item in map(str.strip, cfg.input.split(",")) if item]
    require(name or items, f"dataset={cfg.dataset!r} is none of {', '.join(BUILT_IN)}: say what to read with --input=FILES")
    paths = walk(sysconfig.get_path("stdlib"), ".py", STDLIB_SKIP) if name == "stdlib" else []
    if name == "shakespeare": paths = [fetch(SHAKESPEARE, join(folder, "input.txt"), SHAKESPEARE_SHA)]
    for item in items:
        require(exists(item), f"--input: there is no file or folder {item!r}" + " (no patterns: name the folder)" * ("*" in item))
        found = walk(item) if os.path.isdir(item) else [item] if item.lower().endswith(ENDINGS) and os.path.isfile(item) else []
        require(found, f"nothing to read in {item!r}, only {' '.join(ENDINGS)}: write it as .jsonl, e.g. by datasets' to_json")
        paths += found
    require(paths, f"nothing to read for dataset={cfg.dataset!r}, such as .py files in this Python's library: use --input=FILES")
    spans = [span(path, "jsonl" if path.lower().endswith(".jsonl") else "text") for path in dict.fromkeys(paths)]
    full = [s for s in spans if s.stop]
    if [s.kind for s in full] != ["text"]: return spans
    path, middle = full[0].path, int(full[0].stop * (1 - cfg.val_fraction))     # a single text: its last part is for validation
    ahead = np.fromfile(path, np.uint8, 3, offset=middle).tobytes()
    middle += len(ahead) - len(ahead.lstrip(bytes(range(0x80, 0xC0))))          # past UTF-8 continuation bytes: whole characters
    return [Span(path, 0, middle, "single", TRAIN, True), span(path, "single", VAL, middle), *(s for s in spans if not s.stop)]

def cut(span):
    """Yield the span in parts of about UNIT bytes; longer where there is no place to cut."""
    for at in range(span.start + UNIT, span.stop - UNIT, UNIT):
        if place := PLACE[span.kind](np.fromfile(span.path, np.uint8, min(UNIT, 1 << 16), offset=at).tobytes()):
            yield span._replace(stop=at + place, last=span.kind in MANY)
            span = span._replace(start=at + place)
    yield span

def parse(item):
    """The JSON object of one line -> its form and its parts, [(text, counts)]. A part that counts is trained on and ends in an
    end-of-text; the others are only context. What follows the last answer is left out. Only here, and in CHAT_TEMPLATE, is the
    template, plain text:
    {"prompt": "Hi", "response": "Hello"} -> ("answers", [("User: Hi\n\nAssistant:", False), (" Hello", True)])"""
    def exchange(question, answer): return [("user", question), ("assistant", answer)]
    if isinstance(item, list): item = {"messages": item}
    if "chosen" in item: turns = exchange(item["prompt"], item["chosen"]) + exchange(item["prompt"], item["rejected"])
    elif {"instruction", "output"} <= {*item}:
        turns = exchange(item["instruction"] + ("\n\n" + item["input"] if item.get("input") else ""), item["output"])
    elif "messages" in item: turns = [(m["role"], m["content"]) for m in item["messages"]]
    elif "prompt" in item and (answer := {"completion", "response"} & {*item}):
        turns = exchange(item["prompt"], item[max(answer)])
    elif "text" in item: return "text", [(item["text"], True)]      # last: Alpaca's rows have it, too
    else: raise ValueError(f"it has {list(item)}")
    parts, context = [], ""
    for role, text in turns:
        if role == "assistant": parts, context = parts + [(context + "Assistant:", False), (" " + text, True)], ""
        else: context += role.capitalize() + ": " + text + "\n\n"
    if not parts: raise ValueError("no turn is the assistant's")
    return "pairs" if "chosen" in item else "answers", parts

def prompt_of(text):
    """A user's text as the template has it: "Hi" -> "User: Hi\n\nAssistant:"."""
    return parse(dict(prompt=text, response=""))[1][0][0]

# parse's template for other programs, in Jinja
CHAT_TEMPLATE = ("{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {{ m.content }}<|endoftext|>{% else %}"
                 "{{ m.role | capitalize }}: {{ m.content }}\n\n{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}Assistant:{% endif %}")

def to_bytes(text):
    try: return text.encode("utf-8", "surrogateescape")                         # bytes that were not UTF-8 come back unchanged
    except UnicodeEncodeError: return text.encode("utf-8", "surrogatepass")     # but not beside a lone surrogate such as \ud83d

def documents(unit):
    """Yield the documents of spans, empty ones too: (span, form, [(bytes, counts)]), see parse. Most have one part; it counts."""
    for span in unit:
        with open(span.path, "rb") as f:
            f.seek(span.start)
            data = f.read(span.stop - span.start)
        require(span.start or not bpe.utf16(data[:1024]), f"{span.path} is UTF-16: convert it to UTF-8")
        if not span.start: data = data.removeprefix(b"\xef\xbb\xbf")      # a byte order mark, which is not text
        if span.kind not in MANY: yield span, "text", [(data, True)]
        elif span.kind == "stories":
            stories = [s.strip(b"\r\n") for s in re.split(rb"(?m)^<\|endoftext\|>\r?$", data)]
            if not stories[-1]: stories.pop()               # nothing stands behind the last separator
            for story in stories: yield span, "text", [(story, True)]
        else:
            for n, line in enumerate(data.split(b"\n"), 1):     # n: counted from the beginning of the span
                if not line.strip(): continue
                try:
                    form, parts = parse(json.loads(line.decode("utf-8-sig", "surrogateescape")))
                    parts = [(to_bytes(text), counts) for text, counts in parts]
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
                    with open(span.path, "rb") as f: n += sum(1 for _ in itertools.takewhile(lambda _: f.tell() <= span.start, f))
                    raise ValueError(f'{span.path}, line {n}: not a JSON object with "text", "messages", "prompt" and "response" '
                                     '(or "completion"), "instruction" and "output", or "prompt", "chosen" and "rejected", as '
                                     f"strings ({e!r:.99}): {line[:60]!r}") from None
                yield span, form, parts

# ---- documents -> splits -> token ids ------------------------------------------------------------------------------------
def key_of(span, parts):
    """64 bits of the sha256 of a document's text; a later part of a long document is hashed together with its offset."""
    digest = hashlib.sha256((0 if span.kind in MANY else span.start).to_bytes(8, "little"))
    for text, _ in parts: digest.update(text)
    return int.from_bytes(digest.digest()[:8], "little")

def read_unit(unit):
    """-> a row for each document or part of one (size: its bytes; counts: those trained on); forms; files that hold ENDOFTEXT."""
    docs = list(documents(unit))
    rows = [(key_of(span, parts), sum(len(text) for text, _ in parts), sum(len(text) for text, counts in parts if counts),
             span.fate, span.last) for span, _, parts in docs]
    kinds = [("key", "<u8"), ("size", "<u8"), ("counts", "<u8"), ("fate", "u1"), ("last", "?")]
    marked = {span.path for span, _, parts in docs if any(ENDOFTEXT.encode() in text for text, _ in parts)}
    return np.array(rows, kinds), {form for _, form, _ in docs}, marked

def choose(rows, val_fraction):
    """-> TRAIN, VAL or DROP for each row; number of duplicates; number of empty documents. A document's split depends only on its
    own key, so adding others does not move it; but the smallest key is always in VAL, the largest in TRAIN, and the two splits
    change places if VAL has more text, as may happen with few documents. A long document's key is the sum of its parts' keys.
    Among n documents, two different ones pass for duplicates with probability n^2 / 2^65."""
    ends = np.flatnonzero(rows["last"])
    starts, fate = np.append(0, ends[:-1] + 1), rows["fate"][ends]
    keys, sizes = np.add.reduceat(rows["key"], starts), np.add.reduceat(rows["size"], starts)
    duplicate = sizes > 0
    duplicate[np.unique(keys, return_index=True)[1]] = False        # the first document with its key
    fate[duplicate | (sizes == 0)] = DROP
    if (free := fate == FREE).any():
        limit = np.clip(np.uint64(val_fraction * 2 ** 64), keys[free].min() + np.uint64(1), keys[free].max())
        fate[free] = np.where(keys[free] < limit, VAL, TRAIN)
        if val_fraction < 0.5 and sizes[free & (fate == VAL)].sum() > sizes[free & (fate == TRAIN)].sum():
            fate[free] = TRAIN + VAL - fate[free]
    if not {TRAIN, VAL} <= set(fate.tolist()):
        raise ValueError(f"one document does not make two splits: give more, or one text file long enough for {val_fraction=}")
    return np.repeat(fate, ends + 1 - starts), int(duplicate.sum()), int((sizes == 0).sum())

def read_again(unit, rows):
    docs = list(documents(unit))
    if [key_of(span, parts) for span, _, parts in docs] != rows["key"].tolist():
        raise ValueError(f"{unit[0].path} or a file after it changed while it was being read: run again")
    return docs

def encode_unit(tok, n_files, job):
    """(unit, rows of its documents) -> the bytes they add to each of the first n_files of FILES: the ids of each split, then for
    each split which ids count."""
    (unit, rows), docs = job, read_again(*job)
    kept = [(text, counts, span, fate) for (span, _, parts), fate in zip(docs, rows["fate"]) if fate != DROP
            for text, counts in parts]
    texts = [text for text, *_ in kept]
    encoded = [np.frombuffer(text, "<u2") for text in texts] if unit[0].kind == "tokens" else tok.encode_batch(texts)
    eot, out = np.array([tok.special_tokens.get(ENDOFTEXT, 0)], "<u2"), [[] for _ in FILES]
    for (_, counts, span, fate), ids in zip(kept, encoded):
        ends = counts and span.last and span.kind in ("text", *MANY)        # 0 or 1 end-of-text; a single text needs none
        out[fate] += [ids, eot[:ends]]                                      # FILES[fate] is the split's .bin,
        out[2 + fate].append(bytes([counts]) * (len(ids) + ends))           # FILES[2 + fate] its .mask
    return [b"".join(parts) for parts in out[:n_files]]

def write_bins(work, encode, jobs, names):
    """Append what encode(jobs) yields (see encode_unit) to the files `names` in the folder `work`. state.json records how far
    they are, but never more than is safely on disk."""
    paths, state, done, sizes = [join(work, name) for name in names], join(work, "state.json"), 0, [0] * len(names)
    with contextlib.suppress(OSError, ValueError, TypeError):               # state.json is missing or damaged: start over
        units, ends = bpe.read(state, json.loads)
        if 0 < units <= len(jobs) and all(0 <= end <= size_of(path) for path, end in zip(paths, ends, strict=True)):
            done, sizes = units, ends                                       # if not: killed while the files were being renamed
    if done: print(f"going on: {done} of {len(jobs)} units are already encoded", flush=True)
    files, saved = [open(path, "ab") for path in paths], time.time()
    for f, size in zip(files, sizes): f.truncate(f.seek(size))
    for done, arrays in enumerate(encode(jobs[done:]), done + 1):
        for f, array in zip(files, arrays): f.write(array)
        if done == len(jobs) or time.time() - saved > SAVE:
            for f in files:
                f.flush()
                os.fsync(f.fileno())
            sizes, saved = [f.tell() for f in files], time.time()
            bpe.write_json(state, [done, sizes])
    for f in files: f.close()

def count_tokens(path, tok):
    """-> how many documents and how many bytes of text a bin holds."""
    ids, eot = np.memmap(path, "<u2", "r"), tok.special_tokens[ENDOFTEXT]
    counts = sum(np.bincount(ids[at:at + UNIT], minlength=tok.vocab_size) for at in range(0, len(ids), UNIT))
    return int(counts[eot]), int(sum(counts[i] * len(token) for i, token in tok.vocab.items() if i != eot))

# ---- the dataset's folder ------------------------------------------------------------------------------------------------
def knobs(cfg):
    """The knobs that decide what data/<dataset> holds, a tokenizer file as its sha256. ValueError if they cannot work."""
    named = cfg.tokenizer in ("bpe", "gpt2")
    require(re.fullmatch(r"\w[\w.-]*", cfg.dataset), f"dataset={cfg.dataset!r} is not a plain name: use letters, digits, _ . -")
    name = re.sub(r"\W+", "_", basename(cfg.input.rstrip("/")).partition(".")[0]) or "mine"
    require(not (cfg.input and built_in(cfg)), f"--input needs a --dataset=NAME of its own, such as --dataset={name}: "
            f"{cfg.dataset!r} is a built-in text")
    require(built_in(cfg) != "fineweb" or cfg.tokenizer == "gpt2", "fineweb comes as GPT-2 tokens: it needs --tokenizer=gpt2")
    require(cfg.tokenizer != "bpe" or 256 <= cfg.vocab_size <= 65536,
            f"vocab_size={cfg.vocab_size} must be between 256 (the bytes) and 65536 (what uint16 holds)")
    require(named or os.path.isfile(cfg.tokenizer), f"tokenizer={cfg.tokenizer!r} is neither bpe nor gpt2 nor a file")
    names = (["input"] if cfg.input else []) + (["vocab_size", "split_pattern"] if cfg.tokenizer == "bpe" else [])
    names += {"fineweb": ["num_shards"], "tinystories": []}.get(built_in(cfg), ["val_fraction"])
    return {"tokenizer": cfg.tokenizer if named else sha256(cfg.tokenizer)} | {name: getattr(cfg, name) for name in names}

def prepared(cfg): return exists(join("data", cfg.dataset, "meta.json"))

def outdated(cfg):
    """True if a file of --input is newer than the prepared dataset. False if --input is gone: the dataset is used without it."""
    made = os.path.getmtime(join("data", cfg.dataset, "meta.json")) if prepared(cfg) and cfg.input else 0
    with contextlib.suppress(ValueError, OSError): return made > 0 and any(os.path.getmtime(s.path) > made for s in sources(cfg))

def verify(cfg):
    """-> the contents of meta.json. Raises FileNotFoundError if the dataset is not prepared; ValueError, with the remedy, if it
    was prepared with knobs other than cfg's or its files are not whole."""
    folder, again, wanted = join("data", cfg.dataset), "run prepare.py with this config again", knobs(cfg)
    if not prepared(cfg): raise FileNotFoundError(f"{folder} is not prepared: run prepare.py with this config")
    try:
        meta = bpe.read(join(folder, "meta.json"), json.loads)
        made_with = {**meta["knobs"]}
        if not {"tokens", "sha256", "vocab_size", "tokenizer", "tokenizer_hash"} <= {*meta}: raise LookupError
    except (ValueError, LookupError, TypeError): raise ValueError(f"{folder}/meta.json is damaged: {again}") from None
    for key, value in wanted.items():
        same = (found := made_with.get(key)) == value
        if not same and key == "tokenizer" and os.path.isfile(cfg.tokenizer):       # which may hold the same tokenizer
            same = Tokenizer.load(cfg.tokenizer).hash == meta["tokenizer_hash"]
        if not same: raise ValueError(f"{folder} was prepared with {key}={found!r}, not {getattr(cfg, key)!r}: {again}")
    check_vocab(cfg, meta["vocab_size"])
    try: whole = meta["tokenizer"] == "gpt2" or Tokenizer.load(join(folder, "tokenizer.json")).hash == meta["tokenizer_hash"]
    except (ValueError, OSError): whole = False
    if not whole: raise ValueError(f"{folder}/tokenizer.json is missing or damaged: {again}")
    for name in meta["sha256"]:
        path, size = join(folder, name), meta["tokens"][name.split(".")[0]] * (2 if name.endswith(".bin") else 1)
        if size_of(path) != size: raise ValueError(f"{path} has {size_of(path):,} bytes, not {size:,}: {again}")
    return meta

def train_tokenizer(cfg, jobs):
    """A tokenizer trained on the training split."""
    docs = (doc for unit, rows in jobs for doc, fate in zip(read_again(unit, rows), rows["fate"]) if fate == TRAIN)
    texts = (b"".join(text for text, _ in parts) for _, _, parts in docs)
    pattern = dict(gpt2=bpe.GPT2_SPLIT, gpt4=bpe.GPT4_SPLIT)[cfg.split_pattern]
    return Tokenizer.train(texts, cfg.vocab_size, pattern, workers=cfg.workers, verbose=True)

def lock(path, busy=""):
    """-> an open file that holds a lock until it is closed. If another process has the lock: None, or print `busy` and wait."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, "w")
    with contextlib.suppress(ImportError, OSError):         # Windows and some network disks have no such locks
        import fcntl
        try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not busy: return None
            print(busy, flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
    return file

def main(cfg):
    start, cfg = time.time(), own_tokenizer(cfg)
    folder, meta = join("data", cfg.dataset), {"dataset": cfg.dataset, "source": cfg.input or built_in(cfg), "knobs": knobs(cfg)}
    given = None if cfg.tokenizer == "bpe" else Tokenizer.gpt2() if cfg.tokenizer == "gpt2" else Tokenizer.load(cfg.tokenizer)
    if given: check_vocab(cfg, given.vocab_size)
    spans = list(itertools.chain(*map(cut, sources(cfg))))
    units = list(bpe.groups(spans, UNIT, lambda span: span.stop - span.start))
    has_eot = ENDOFTEXT in given.special_tokens if given else cfg.vocab_size > 256
    if not has_eot and units[0][0].kind != "single":
        raise ValueError(f"the tokenizer has no {ENDOFTEXT} to put between documents: for bpe set vocab_size to 257 or more")
    size, n_files = sum(span.stop - span.start for span in spans), len({span.path for span in spans})
    def every(label, function, jobs):                       # function(job) for each job, in order, on all cores
        add = progress(label, size * len(jobs) / len(units))
        for result in bpe.in_order(function, jobs, cfg.workers or bpe.cores()):
            add(size / len(units))
            yield result
    unit_rows, *sets = zip(*every("read", read_unit, units))
    rows, (forms, marked) = np.concatenate(unit_rows), (set().union(*found) for found in sets)
    if marked: print(f"note: {ENDOFTEXT} in {min(marked)} is ordinary text: it does not end a document (a line of .jsonl does)")
    if not rows["size"].any(): raise ValueError(f"nothing to read: {meta['source']} has nothing but empty documents")
    if "pairs" in forms and len(forms) > 1: raise ValueError("preference pairs need a dataset of their own: leave out the rest")
    meta["text_hash"] = hashlib.sha256(rows).hexdigest()
    rows["fate"], meta["duplicates"], meta["empty"] = choose(rows, cfg.val_fraction)
    if masked := forms != {"text"}: meta["form"] = "pairs" if "pairs" in forms else "answers"
    print(f"{meta['source']}: {size:,} bytes in {n_files:,} files, dropped {meta['duplicates']:,} duplicate and "
          f"{meta['empty']:,} empty documents", flush=True)
    locked, busy = contextlib.ExitStack(), f"{folder} is being prepared by another run: waiting for it"
    with contextlib.suppress(OSError):      # a folder that cannot be written to may hold the dataset already
        locked.enter_context(lock(join("data", f".{cfg.dataset}.lock"), busy))
    if prepared(cfg):
        try:
            if verify(cfg).get("text_hash") == meta["text_hash"]:
                newest = max(time.time(), *(os.path.getmtime(span.path) for span in spans))
                with contextlib.suppress(OSError): os.utime(join(folder, "meta.json"), (newest, newest))    # see outdated
                return print(f"{folder} is prepared already, nothing to do")
            print(f"preparing again: the text has changed since {folder} was prepared")
        except ValueError as e: print(f"{e}: doing so")

    jobs = list(zip(units, np.split(rows, np.cumsum(list(map(len, unit_rows))))))
    what = json.dumps([meta, [len(rows) for _, rows in jobs]])      # units, too: state.json counts them
    work = join(folder, ".partial-" + hashlib.sha256(what.encode()).hexdigest()[:16])
    names, tok_path = FILES[:4 if masked else 2], join(work, "gpt2" if cfg.tokenizer == "gpt2" else "tokenizer.json")
    os.makedirs(work, exist_ok=True)
    written = sum(size_of(join(work, name)) for name in names)
    need_space(work, size * (2 if cfg.vocab_size < 1024 else 1) - written)  # an id is two bytes; most tokens are two or more
    if not exists(tok_path): (given or train_tokenizer(cfg, jobs)).save(tok_path)
    tok = given or Tokenizer.load(tok_path)
    write_bins(work, lambda jobs: every("encode", functools.partial(encode_unit, tok, len(names)), jobs), jobs, names)
    def count(key): return {name: int(rows[key][rows["fate"] == split].sum()) for split, name in enumerate(SPLITS)}
    meta |= {"tokens": {split: size_of(join(work, split + ".bin")) // 2 for split in SPLITS}, "documents": count("last"),
             "bytes": count("size"), "vocab_size": tok.vocab_size, "dtype": "uint16", "eot": tok.special_tokens.get(ENDOFTEXT),
             "tokenizer_hash": tok.hash, "tokenizer": basename(tok_path), "sha256": {n: sha256(join(work, n)) for n in names}}
    if masked: meta["answers"] = {"bytes": count("counts"), "tokens": {
        split: int(np.memmap(join(work, split + ".mask"), np.uint8).sum()) for split in SPLITS}}
    for split in SPLITS if built_in(cfg) == "fineweb" else ():
        meta["documents"][split], meta["bytes"][split] = count_tokens(join(work, split + ".bin"), tok)
    write(join(work, "meta.json"), lambda f: f.write(json.dumps(meta, indent=1).encode()))

    for name in ("meta.json", "tokenizer.json", *FILES[2:]):    # meta.json goes first and comes last: nobody sees half a dataset
        if exists(join(folder, name)): os.remove(join(folder, name))
    for name in (*FILES, "tokenizer.json", "meta.json"):
        if exists(join(work, name)): os.replace(join(work, name), join(folder, name))
    for old in glob.glob(join(folder, ".partial-*")): shutil.rmtree(old)
    locked.close()
    counts = [f"{split} {meta['tokens'][split]:,} tokens of {meta['documents'][split]:,} documents" for split in SPLITS]
    print(f"{folder}: {', '.join(counts)}, {meta['bytes']['train'] / meta['tokens']['train']:.2f} bytes per token, "
          f"in {time.time() - start:.1f} s")

if __name__ == "__main__": config.run(main)
