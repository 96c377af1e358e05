"""
Byte-level byte pair encoding (BPE): train a tokenizer, encode, decode. One file, on numpy operations over whole arrays.

A regular expression splits the text into words; each word starts as its UTF-8 bytes, ids 0..255. Training repeatedly takes the
most frequent pair of adjacent ids and merges it into the next new id. Encoding repeatedly merges, in each word, the pair that was
learned first, until none is left.

    python bpe.py input.txt --vocab_size=4096 --out=tok.json        # then, in Python:
    tok = Tokenizer.load("tok.json"); ids = tok.encode("hello"); text = tok.decode(ids)

It is fast because words are found, looked up and counted by array operations on chunks of text, and many pairs are merged at once
wherever this provably equals one at a time (`learn_merges`). The encoder merges each distinct word once, and all new words of a
batch together. Ids equal tiktoken's, merges rustbpe's: among equally frequent pairs the smallest (left id, right id) wins. A byte
that is not valid UTF-8 is kept and treated as a character that is neither letter, number nor space, so that
decode_bytes(encode(b)) == b for any bytes, unless a normalizer is set. In a str, lone surrogates become U+FFFD, as in tiktoken.

References: Sennrich, Haddow, Birch 2016 (arXiv:1508.07909); Radford et al. 2019 (GPT-2: bytes, split pattern, merges file);
tiktoken (GPT-4's pattern, rank files); minbpe and rustbpe, A. Karpathy (the plain algorithm; the tie rule).
"""
# Notation: a word is one match of the split pattern; starts and lens are the words' offsets and lengths in bytes.
import base64, codecs, collections, functools, hashlib, itertools, json, operator, os, re, signal, sys, threading, time
import unicodedata
import numpy as np

# The regexes name the rules and serve tiktoken; split_gpt2 and split_gpt4 carry the rules out. To change one, change both.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
# Variants of GPT-4's: in tiktoken's cl100k_base, white space at the end of the text is one word; in Qwen's, each digit is a word.
CL100K_SPLIT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
                r"|\s+(?!\S)|\s")
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K_HF = CL100K_SPLIT.replace("{1,3}+", "{1,3}")    # for Hugging Face's engine, where {1,3}+ repeats {1,3}
SAME_SPLIT = {CL100K_HF: CL100K_SPLIT,    # other spellings of the patterns above; the next is Llama 3's, the last is tiktoken's
              QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"): GPT4_SPLIT,
              r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2_SPLIT}
ENDOFTEXT = "<|endoftext|>"
CHUNK = 1 << 17            # bytes split at once: few enough that their arrays stay in the CPU's cache
BATCH = 1 << 23            # bytes sent to a worker process at once
SLOTS = 19                 # the table in which array operations look up words has 2^SLOTS slots
CACHE = 1 << 20            # words whose ids the encoder remembers
HOT = 1024                 # most frequent pairs, which the trainer tracks until they run out
LONG = 64                  # bytes; longer words are rare: Python's hash makes their keys, tiktoken's engine merges them
NONE = np.iinfo(np.int32).max   # in place of an id: these two do not merge
TEXT = str, bytes, bytearray, memoryview    # what a text may be

# ---- Text to words ------------------------------------------------------------------------------------------------------------

SPACE, WHITE, NEWLINE, LETTER, NUMBER, OTHER, EDGE, UNKNOWN = range(8)   # character classes; an EDGE separates texts
# subtle: their order matters. c <= NEWLINE is white space, c <= WHITE is white space without newlines
CLASS = np.full(0x110000, UNKNOWN, np.uint8)   # class of each code point; beyond ASCII it is looked up on first use
CLASS[:128] = [SPACE if c == " " else NEWLINE if c in "\r\n" else WHITE if c in "\t\v\f" else
               LETTER if c.isalpha() else NUMBER if c.isdigit() else OTHER for c in map(chr, range(128))]
CLASS[0xD800:0xE000] = OTHER                   # surrogates stand for bytes that are not UTF-8

def classes(code):
    """Class of each code point. New ones come from tiktoken's own engine: Python's Unicode may differ in thousands of them."""
    found = CLASS.take(code)
    if (found == UNKNOWN).any():
        import tiktoken
        new = np.add.outer(np.unique(code[found == UNKNOWN] >> 10) << 10, np.arange(1 << 10, dtype="<u4"))   # in blocks of 1,024
        new = new[CLASS[new] == UNKNOWN]
        text, ranks = new.tobytes().decode("utf-32-le"), {bytes([i]): i for i in range(256)}
        for cls, regex in (LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (WHITE, r"\s+"):
            plain = tiktoken.Encoding("bytes", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
            matched = bytes(plain.encode_ordinary(text)).decode()    # what the regex does not match gives no tokens
            CLASS[np.frombuffer(matched.encode("utf-32-le"), "<u4")] = cls
        CLASS[new[CLASS[new] == UNKNOWN]] = OTHER       # last, as other threads may read CLASS meanwhile
        found = CLASS.take(code)
    return found

def code_points(raw):
    """bytes -> the code point of each character, and its offset. A byte that is not UTF-8 is one, too: 0xDC00 + the byte."""
    if raw.isascii(): return np.frombuffer(raw, np.uint8), np.arange(len(raw))
    code = np.frombuffer(raw.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), "<u4")
    size = 1 + (code >= 0x80).view(np.uint8) + (code >= 0x800) + (code >= 0x10000)      # in UTF-8
    size[(code >= 0xDC80) & (code < 0xDD00)] = 1
    return code, np.cumsum(size, dtype=np.int64) - size

def split_gpt2(c):
    """Character classes of a text -> True where a word starts, contractions aside."""
    white, before, after, start = c <= NEWLINE, c[:-1], c[1:], np.ones(len(c), bool)
    # A word is a run of one class with at most one space before it. The last white space before another class starts a word.
    start[1:] = np.where(white[1:], ~white[:-1], (before != after) & (before != SPACE))
    start[:-1] |= white[:-1] & ~white[1:] & (after != EDGE)
    return start

def split_gpt4(c, pattern):
    """The same for GPT-4's pattern and its variants."""
    before, after, start = c[:-1], c[1:], np.ones(len(c), bool)
    joins = ((before <= NEWLINE) & (after <= NEWLINE) | (before == OTHER) & (after == NEWLINE)   # punctuation takes its newlines
             | (before == SPACE) & (after == OTHER) | (before <= WHITE) & (after == LETTER))
    start[1:] = (before != after) & ~joins
    def runs(mask): return np.flatnonzero(np.diff(mask, prepend=False)).reshape(-1, 2).T    # where each begins; what follows it
    # Blanks (white space without newlines) are one word with a newline after them. The last blank before a word stands alone or
    # joins that word. As c ends in an EDGE, every run has an end; and c[line - 1] is that EDGE if c begins with a newline.
    (blank, blank_end), (line, line_end) = runs(c <= WHITE), runs(c == NEWLINE)
    follows = c[blank_end]
    start[line_end[c[line - 1] == OTHER]] = True    # what follows newlines that punctuation took
    start[blank[(follows > NEWLINE) & (follows <= (OTHER if pattern == CL100K_SPLIT else EDGE))]] = True
    start[blank_end[(follows > NEWLINE) & (follows < EDGE)] - 1] = True
    start[1:] &= ~((before == OTHER) & (after == LETTER) & start[:-1])   # one character joins letters, unless a space took it
    digit, most = np.flatnonzero(c == NUMBER), 1 if pattern == QWEN_SPLIT else 3
    first = np.flatnonzero(start[digit])    # the first digit of each number; from there, every `most`-th digit starts a word
    start[digit] = (np.arange(len(digit)) - np.repeat(first, np.diff(first, append=len(digit)))) % most == 0
    return start

def contractions(start, code, fold):
    """Make 's 'd 'm 't 'll 've 're words where a word starts with one. fold: ignore case; U+017F, the long s, is then an s."""
    at = np.flatnonzero((code == ord("'")) & start)
    a, b = (code[np.minimum(at + i, len(code) - 1)] for i in (1, 2))
    if fold: a, b = np.where(a == 0x17F, ord("s"), a | 0x20), b | 0x20
    one = np.logical_or.reduce([a == ord(x) for x in "sdmt"])
    two = np.logical_or.reduce([(a == ord(x)) & (b == ord(y)) for x, y in ("ll", "ve", "re")])
    for found, size in (at[one], 2), (at[two], 3): start[found + 1], start[found + size] = False, True

def split(texts, pattern):
    """list of bytes -> (all of them joined, starts and lens of the words, number of words up to the end of each text)."""
    raw = b"\n".join([*texts, b""])
    edges = np.cumsum([len(text) + 1 for text in texts]) - 1    # offset of the "\n" after each text, which belongs to no word
    code, offset = code_points(raw)
    c, edge = classes(code), np.searchsorted(offset, edges)     # edge: the same place, counted in characters
    c[edge] = EDGE
    start = split_gpt2(c) if pattern == GPT2_SPLIT else split_gpt4(c, pattern)
    contractions(start, code, fold=pattern != GPT2_SPLIT)
    start[edge] = True
    starts = offset[np.flatnonzero(start)]
    drop = np.searchsorted(starts, edges)                       # the same place, counted in words
    return raw, np.delete(starts, drop), np.delete(np.diff(starts, append=len(raw)), drop), drop - np.arange(len(drop))

def as_bytes(text):
    try: return text.encode() if isinstance(text, str) else b"".join([text])    # not bytes(text): bytes(7) is 7 zeros
    except UnicodeEncodeError:   # lone surrogates
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()

def utf16(head): return head[:2] in (b"\xff\xfe", b"\xfe\xff") and b"\0" in head     # the beginning of a file

def nfc(text): return unicodedata.normalize("NFC", text.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

def last_place(text):
    """bytes -> offset of the last place where a text that contains them may be cut, whatever stands around them; 0 if there is
    none. At such a place every pattern finds the same words in the parts as in the whole, and normal form C is the same, too."""
    code, offset = code_points(text)
    c = classes(code)
    # No pattern looks behind. White space looks ahead or joins what follows: no place after it. Of the other classes only
    # punctuation goes on into another one: letters or newlines.
    before, after, left, right = c[:-1], c[1:], code[:-1], code[1:]
    place = (before > NEWLINE) & (after != before) & ~((before == OTHER) & ((after == LETTER) | (after == NEWLINE)))
    # what may come after it: NFC joins none of these to what precedes, and none is half a character. U+2000: dashes and quotes
    place &= (right < 0x300) | (right >= 0x2000) & (right < 0x20D0) | (right >= 0x3000) & (right < 0x302A)
    # what may come before it: NFC turns some letters left out here (U+0958) into a letter and a mark, which is punctuation
    place &= (after <= WHITE) | (left < 0x958) | (left > 0xB5D) & (left < 0xF43) | (left > 0xF69) & (left < 0xD800)
    place[:3] = False                                                   # the text may begin with the rest of a character
    return offset.item(np.flatnonzero(place)[-1] + 1) if place.any() else 0

def cut(blocks):
    """Parts (str or bytes) of one text -> pieces of about CHUNK bytes that together have the words of the whole, by any pattern.
    A piece is longer only where there is no place to cut: inside a word, white space, or lines of nothing but punctuation."""
    held, want = bytearray(), CHUNK
    for block in map(as_bytes, blocks):
        for i in range(0, len(block), CHUNK):
            held += block[i:i + CHUNK]
            if len(held) < want: continue
            if place := last_place(held[-1024:]):
                place += max(len(held) - 1024, 0)
                yield bytes(held[:place])
                del held[:place]
            want = len(held) + CHUNK        # not sooner: without a place, every short part would be searched
    yield bytes(held)

def groups(items, size, length=len):
    """Lists of consecutive items, about `size` bytes each."""
    total = 0
    def number(item):
        nonlocal total
        total += length(item) + 1       # + 1: a group must not collect too many empty items, either
        return total // size
    for _, group in itertools.groupby(items, number): yield list(group)

# ---- Words to numbers ---------------------------------------------------------------------------------------------------------

U = np.uint64
MIX = np.frombuffer(os.urandom(24), U) | U(1)              # odd, so that multiplying loses no bits
KEEP = np.array([(1 << 8 * i) - 1 for i in range(9)], U)   # KEEP[i] keeps the first i bytes

def word_keys(raw, starts, lens):
    """-> a uint64 key for each word. Up to 7 bytes it is the word itself, its length in the top byte; a longer word gets a 63-bit
    hash with multipliers that each process draws at random: among a million distinct words two collide with probability 1e-7."""
    eight = np.ndarray(len(raw), "<u8", raw + bytes(7), strides=(1,))    # eight[i] is raw[i:i + 8]
    keys = eight[starts] & KEEP[np.minimum(lens, 8)] | lens.astype(U) << U(56)
    todo = np.flatnonzero(lens > 7)
    keys[todo] = lens[todo].astype(U) * MIX[2]
    for i in range(0, LONG, 8):
        block = eight[starts[todo] + i] & KEEP[np.minimum(lens[todo] - i, 8)]
        h = (keys[todo] ^ block) * MIX[0]
        keys[todo] = (h ^ h >> U(32)) * MIX[1] | U(1 << 63)
        todo = todo[lens[todo] > i + 8]
    for word in todo: keys[word] = hash(raw[starts[word]:starts[word] + lens[word]]) & (1 << 63) - 1 | 1 << 63
    return keys

class Words(dict):
    """Distinct words, bytes -> number, in the order they are added. As a dict looks up one Python object at a time, arrays of
    words go through a table first: the slot that a word's key selects holds the key and number of the last word to use it."""

    def __init__(self):
        self.keys_in, self.numbers_in = np.zeros(1 << SLOTS, U), np.zeros(1 << SLOTS, np.int64)

    def number(self, raw, starts, lens):
        """The number of each word; new words get the next ones."""
        keys = word_keys(raw, starts, lens)
        slot = (keys * MIX[2] >> U(64 - SLOTS)).view(np.int64)
        numbers, todo = self.numbers_in.take(slot), np.flatnonzero(self.keys_in.take(slot) != keys)
        while len(todo):
            self.keys_in[slot[todo]] = keys[todo]    # of different words that want one slot, the last wins; the others try again
            won = self.keys_in[slot[todo]] == keys[todo]
            winners, todo = todo[won], todo[~won]
            self.numbers_in[slot[winners]] = winners     # not numbers yet, but marks: the last of equal words keeps its own
            last = winners[self.numbers_in[slot[winners]] == winners]       # and goes to the dict for all
            texts = [raw[i:i + n] for i, n in zip(starts[last].tolist(), lens[last].tolist())]
            self.numbers_in[slot[last]] = [self.setdefault(text, len(self)) for text in texts]
            numbers[winners] = self.numbers_in[slot[winners]]
        return numbers

# ---- Worker processes ---------------------------------------------------------------------------------------------------------

def cores():
    """How many cores this process may use, of all that there are: batch systems and containers give out a part."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

def work(function, pipe):
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends a worker at once; the parent reports it
    import multiprocessing
    def end_with_parent():                          # even with one that is killed and so cannot end its workers
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        try: job = pipe.recv()
        except EOFError: return             # no more jobs, or no parent
        try: result = function(job), None
        except Exception as e: result = None, e
        pipe.send(result)

def start_process(process):
    """Start a process, and delay Ctrl-C meanwhile: in the middle of a fork Python would print a traceback for it, or lose it.
    Masking the signal would not help, as another thread would take it. Only the main thread handles signals."""
    if threading.current_thread() is not threading.main_thread(): return process.start()
    pending = []
    before = signal.signal(signal.SIGINT, lambda *args: pending.append(args))
    try: process.start()
    finally: signal.signal(signal.SIGINT, before)
    if pending: signal.raise_signal(signal.SIGINT)

def talk(transfer, *args):
    """transfer(*args), a pipe's send or recv: the worker at the other end may have died, even halfway through a message."""
    try: return transfer(*args)
    except (EOFError, OSError):
        raise OSError("a worker process died, perhaps because memory ran out: run again with --workers=1") from None

def in_order(function, jobs, workers):
    """Yield function(job) for each job, in order. `workers` processes hold one job each, so memory is bounded. OSError if one
    dies. Each has its own pipe: in a shared one (concurrent.futures), a process that dies while writing would block the rest."""
    jobs = iter(jobs)
    head = list(itertools.islice(jobs, 3))
    jobs, team, busy = itertools.chain(head, jobs), [], collections.deque()
    if workers == 1 or len(head) < 3: return (yield from map(function, jobs))     # starting processes would take longer
    import multiprocessing
    if multiprocessing.current_process().daemon: return (yield from map(function, jobs))    # a worker itself: it may start none
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")       # fork where it is safe
    first, script = list(itertools.islice(jobs, workers)), sys.modules["__main__"]
    try:
        # a spawned worker imports the caller's script, which for train.py means all of torch: hide it, unless function is in it
        hide = context.get_start_method() == "spawn" and getattr(function, "func", function).__module__ != "__main__"
        if hide: sys.modules["__main__"] = type(sys)("__main__")
        for _ in first:
            pipe, worker_end = context.Pipe()
            team.append(context.Process(target=work, args=(function, worker_end), daemon=True))
            start_process(team[-1])
            worker_end.close()      # then the pipe closes when the worker dies
            busy.append(pipe)
        sys.modules["__main__"] = script
        for pipe in busy: talk(pipe.send, first.pop(0))     # only now: a spawned worker does not read before its imports are done
        while busy:
            pipe = busy.popleft()
            result, error = talk(pipe.recv)
            if error: raise error
            for job in itertools.islice(jobs, 1):       # the next one, if there is one
                talk(pipe.send, job)
                busy.append(pipe)
            yield result
    finally:
        sys.modules["__main__"] = script
        for process in filter(lambda process: process.pid, team):       # those that were started
            process.kill()
            process.join()

def count_words(pieces, pattern):
    """list of texts as bytes -> dict of distinct words with their counts; runs in a worker."""
    words = Words()
    numbers = [words.number(*split(group, pattern)[:3]) for group in groups(pieces, CHUNK)]
    return dict(zip(words, np.bincount(np.concatenate(numbers)).tolist()))

# ---- Merging ------------------------------------------------------------------------------------------------------------------

class Pairs:
    """The n pairs of adjacent symbols in a dict of words with their counts. Pair p has key[p], which is left << 32 | right, the
    count[p] and the positions pool[begin[p]:begin[p + 1]]; a merge adds pairs and sets the counts of those merged to 0.

    The words are linked lists (sym, nxt, prv) with a separator -1 around each. pid[pos] is the pair that now starts at pos, so
    one comparison shows whether a stored position still holds its pair. A merge removes one symbol and stores at most two
    positions: three times the text is enough room, and what is not used costs nothing."""

    def __init__(self, words):
        lens, counts = (np.fromiter(numbers, np.int64, len(words)) for numbers in (map(len, words), words.values()))
        text = np.frombuffer(b"".join(words), np.uint8).astype(np.int32)
        self.sym = np.insert(text, np.append(0, np.cumsum(lens)), -1)
        size = len(self.sym)
        self.nxt, self.prv = np.arange(1, size + 1, dtype=np.int32), np.arange(-1, size - 1, dtype=np.int32)
        self.weight = np.append(0, np.repeat(counts, lens + 1))    # count of the word around each position
        self.pid = np.full(size, -1, np.int32)
        self.n, self.pool = 0, np.zeros(3 * size, np.int32)
        self.key, self.count, self.begin = np.zeros((3, 3 * size), np.int64)
        self.store(np.arange(size - 1, dtype=np.int32))

    def store(self, at):
        """Store the pairs that start at these positions, all of them new; -> their numbers."""
        key = self.sym[at].astype(np.int64) << 32 | self.sym[self.nxt[at]]
        at, key = at[key >= 0], key[key >= 0]   # a separator makes the key negative
        # the first call has pairs of bytes only, which fit into 16 bits: a radix sort
        order = np.argsort(key) if self.n else np.argsort((key >> 24 | key & 255).astype(np.uint16), kind="stable")
        at, key = at[order], key[order]
        first = np.flatnonzero(key != np.append(-1, key[:-1]))
        old, self.n, used = self.n, self.n + len(first), int(self.begin[self.n])
        end = np.append(first, len(at))[1:]
        self.key[old:self.n], self.count[old:self.n] = key[first], np.add.reduceat(self.weight[at], first)
        self.begin[old + 1:self.n + 1], self.pool[used:used + len(at)] = used + end, at
        new = np.arange(old, self.n)
        self.pid[at] = np.repeat(new, end - first)
        return new

    def merge(self, pairs, base):
        """Replace these pairs by the symbols base, base + 1, ...; -> the numbers of the new pairs that result."""
        parts = [self.pool[i:j] for i, j in zip(self.begin[pairs].tolist(), self.begin[pairs + 1].tolist())]
        pos, which = np.concatenate(parts), np.repeat(np.arange(len(pairs)), list(map(len, parts)))
        live = np.flatnonzero(self.pid[pos] == pairs[which])
        pos, which = pos[live], which[live]
        if len(pairs) == 1:    # it may be (a, a), which overlaps itself in a run of a: take the first, third, ... of each run
            pos = np.sort(pos)
            i, begins_run = np.arange(len(pos)), self.prv[pos] != np.append(-1, pos[:-1])
            pos = pos[(i - np.maximum.accumulate(np.where(begins_run, i, 0))) % 2 == 0]
            which = which[:len(pos)]
        right, w = self.nxt[pos], self.weight[pos]
        for beside in right, self.prv[pos]:    # the pairs on both sides disappear; at a word's end pid -1 means count[-1], unused
            np.subtract.at(self.count, self.pid[beside], w)
            self.pid[beside] = -1              # subtle: a pair between two merges is subtracted only once
        self.count[pairs], self.pid[pos] = 0, -1
        after = self.nxt[right]
        self.sym[pos], self.sym[right], self.nxt[pos], self.prv[after] = base + which, -1, after, pos
        left = self.prv[pos]
        return self.store(np.append(left[self.sym[left] < base], pos))  # left neighbours that merged as well are in pos already

def learn_merges(words, n_merges, add=lambda n: None):
    """dict of words with their counts -> up to n_merges pairs (left id, right id), most frequent first.

    Takes many merges at once. Let p1, p2, ... be the pairs in order (falling count, then rising key). Merging p1 = (a, b) removes
    only pairs (x, a) and (b, y), and raises no old count, so p2 = (l, r) keeps its count and place if l != b and r != a. A new
    pair (x, ab) or (ab, y) is at most as frequent as the old (x, a) or (b, y) and has a larger key; so if it came before p2, the
    old one would, too, and the old one touches p1. Hence: walk down the order and stop at the first pair that touches an earlier
    one (l == b or r == a) or is (a, a), which overlaps itself and goes alone. What was passed is what one merge at a time takes.

    `hot` holds every pair that ranks as high as the HOT-th did when it was last filled; a batch takes at most its first 64."""
    pairs, merges, hot = Pairs(words), [], []
    def first(count, key, n):   # indices of the first n pairs, in order
        limit = np.partition(count, -n)[-n] if len(count) > n else 1
        top = np.flatnonzero(count >= max(1, limit))
        return top[np.lexsort((key[top], -count[top]))][:n]
    while len(merges) < n_merges:
        if not len(hot):
            hot = first(pairs.count[:pairs.n], pairs.key, HOT)
            if not len(hot): break  # every word is one token
            last_count, last_key = pairs.count[hot[-1]], pairs.key[hot[-1]]
        best = hot[first(pairs.count[hot], pairs.key[hot], min(64, n_merges - len(merges)))]
        batch, lefts, rights = [], set(), set()
        for key in pairs.key[best].tolist():
            left, right = key >> 32, key & 0xFFFFFFFF
            if left in rights or right in lefts or left == right and batch: break
            batch.append((left, right))
            lefts.add(left)
            rights.add(right)
            if left == right: break
        hot = np.append(hot, pairs.merge(best[:len(batch)], 256 + len(merges)))
        count = pairs.count[hot]
        hot = hot[(count > last_count) | (count == last_count) & (pairs.key[hot] <= last_key)]
        merges += batch
        add(len(batch))
    return merges

# ---- Files and progress -------------------------------------------------------------------------------------------------------

def progress(label, total=0, unit=1):
    """-> add(n), which shows progress, time left and speed on stderr: in place on a terminal, else a line every 10 seconds."""
    done, start, shown, tty = 0, time.time(), time.time(), sys.stderr.isatty()
    def add(n):
        nonlocal done, shown
        done, now = done + n, time.time()
        if now - shown >= (0.2 if tty else 10):
            rate, shown = max(done, 1) / (now - start), now
            left = f" of {total / unit:,.0f}, {max(total - done, 0) / rate:,.0f} s left" if total else ""
            end = "\x1b[K\r" if tty else "\n"
            print(f"{done / unit:,.0f} {label}{left}, {rate / unit:,.1f}/s", end=end, file=sys.stderr, flush=True)
    return add

SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]    # GPT-2 spells these bytes as they are; their ids come first
LETTERS = {b: chr(b) for b in SHOWN} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in SHOWN)}
BYTES = {letter: b for b, letter in LETTERS.items()}

def letters(token): return "".join(map(LETTERS.get, token))
def to_bytes(name): return bytes(map(BYTES.__getitem__, name))

def read(path, parse):
    """parse(the text of the file); an error in it becomes a ValueError that names the file."""
    try:
        with open(path, encoding="utf-8") as f: return parse(f.read())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"cannot read {path}: {e if isinstance(e, ValueError) else f'{type(e).__name__} {e}'}") from None

def write(path, save):
    """Write `path` whole or not at all: save(file) fills a temporary file, which is renamed once it is safely on disk."""
    f = open(f"{path}.{os.getpid()}", "wb")
    try:
        with f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, path)
    finally:
        if os.path.exists(f.name): os.remove(f.name)    # after an error: half a file would keep a full disk full

def write_json(path, d):
    write(path, lambda f: f.write(json.dumps(d, separators=(",", ":"), ensure_ascii=False).encode()))

# ---- The tokenizer ------------------------------------------------------------------------------------------------------------

class Tokenizer:
    """256 bytes, merges in the order learned, special tokens. Threads may share a tokenizer.

    merges: list of (left id, right id); merge i makes token 256 + i. tokens: instead of merges, dict bytes -> id, a vocabulary
    made elsewhere; then, as in tiktoken, any two neighbours that together are a token may merge, lowest id first, and a word that
    is a token becomes that token. special_tokens: dict text -> id, or a list of texts, whose ids come last. normalizer: None, or
    "NFC", which encoding applies to the text first. Further attributes: vocab_size, the number of ids a model needs, special
    tokens included; vocab, dict id -> bytes of every token; hash, of tokens, ids, special tokens, pattern and normalizer."""

    def __init__(self, merges, pattern=GPT2_SPLIT, special_tokens=(), tokens=None, normalizer=None):
        self.pattern, self.normalizer = SAME_SPLIT.get(pattern, pattern), normalizer
        self._own = tokens is None      # made of merges, not a vocabulary made elsewhere
        if self.pattern not in (GPT2_SPLIT, GPT4_SPLIT, CL100K_SPLIT, QWEN_SPLIT) or normalizer not in (None, "NFC"):
            raise ValueError(f"split pattern {pattern!r} with normalizer {normalizer!r} is not supported: choose GPT2_SPLIT, "
                             "GPT4_SPLIT, CL100K_SPLIT or QWEN_SPLIT, and None or 'NFC'")
        if self._own:
            self.merges, vocab = [tuple(pair) for pair in merges], {i: bytes([i]) for i in range(256)}
            for left, right in self.merges:
                if left not in vocab or right not in vocab:
                    raise ValueError(f"damaged merges: {left} and {right} are not both bytes or earlier merges")
                vocab[len(vocab)] = vocab[left] + vocab[right]
            tokens = {token: i for i, token in vocab.items()}
        if isinstance(special_tokens, str): raise ValueError(f"special_tokens={special_tokens!r}: want a list of texts or a dict")
        if not isinstance(special_tokens, dict):
            special_tokens = {t: max(tokens.values()) + 1 + i for i, t in enumerate(dict.fromkeys(special_tokens))}
        self._tokens, self.special_tokens = tokens, special_tokens
        self.vocab = {i: token for token, i in tokens.items()} | {i: as_bytes(t) for t, i in special_tokens.items()}
        self.vocab_size = max(self.vocab) + 1
        twins, shared_id = self._own and len(tokens) < len(vocab), len(self.vocab) < len(tokens) + len(special_tokens)
        if twins or shared_id or min(self.vocab) < 0 or "" in special_tokens or not all(bytes([b]) in tokens for b in range(256)):
            raise ValueError("every byte, merge and special token needs an id of its own, and a special token must not be empty")

    @functools.cached_property
    def merges(self):
        """For a vocabulary made elsewhere: the last merge on the way to each token, as pairs of ids, in the order of the tokens'
        ids. Of GPT-2's it gives the published merges. A token that merging does not reach has none."""
        merges, tokens = [], self._tokens
        for token in sorted(tokens, key=tokens.get):
            parts, lowest = [token[i:i + 1] for i in range(len(token))], -1
            while len(parts) > 2 and lowest < tokens[token]:
                lowest, i = min((tokens.get(a + b, NONE), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2 and lowest < tokens[token]: merges.append((tokens[parts[0]], tokens[parts[1]]))
        return merges

    @functools.cached_property
    def _joins(self):
        """The pairs that may merge: those learned, or, in a vocabulary made elsewhere, every two tokens that together are one."""
        tokens = self._tokens
        return self.merges if self._own else [(tokens[t[:i]], tokens[t[i:]]) for t in sorted(tokens, key=tokens.get)
                                              for i in range(1, len(t)) if t[:i] in tokens and t[i:] in tokens]

    @classmethod
    def train(cls, docs, vocab_size, pattern=GPT2_SPLIT, special_tokens=(ENDOFTEXT,), workers=None, verbose=False, n_bytes=0):
        """Learn merges from documents; only the distinct words are held in memory, in about 70 times their size. Text without
        spaces (Chinese, proteins) is nearly all distinct words: take a sample that fits.

        docs: an iterable of documents, each a str, bytes, or an iterable of parts (of a file too large for memory, say). A
        special token in a str or bytes document is not text: it separates, as the end of a document does. vocab_size: the number
        of ids, bytes and special tokens included; 256 is the plain byte tokenizer, without the default special token. If the
        text has too few pairs, the vocabulary is smaller and a line on stderr says so. workers: processes that count words; 0 or
        None: one per core. verbose: progress on stderr, with the time left if n_bytes says how much text there is. Raises
        ValueError for too small a vocab_size or an unknown pattern, OSError if a worker dies."""
        if (workers or 0) < 0: raise ValueError(f"workers is {workers}: give a number of processes, or 0 for one per core")
        if not hasattr(vocab_size, "__index__"): raise ValueError(f"vocab_size is {vocab_size!r}: give an int")
        if isinstance(special_tokens, (str, dict)):
            raise ValueError(f"{special_tokens=}: want a list of texts, whose ids come last")
        special_tokens = [*special_tokens]      # an iterator could be read only once
        if vocab_size == 256 and special_tokens == [ENDOFTEXT]: special_tokens = []
        plain, show = cls([], pattern, special_tokens), progress if verbose else lambda *a: lambda n: None
        if vocab_size < plain.vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}: bytes need 256, bytes and special tokens need {plain.vocab_size}")
        def pieces():
            for doc in [docs] if isinstance(docs, (*TEXT, dict)) else docs:
                if isinstance(doc, dict): raise ValueError("a document is a str or bytes, not a dict: pass row['text']")
                texts = [doc]           # each a list of its parts
                if isinstance(doc, TEXT): texts = [[text] for text in plain._parts(doc, plain.special_tokens)[::2]]
                for text in texts: yield from cut(text)
        n_merges, words = vocab_size - plain.vocab_size, collections.Counter()
        add, count = show("MB counted", n_bytes, 1e6), functools.partial(count_words, pattern=plain.pattern)
        for counts in in_order(count, groups(pieces() if n_merges else (), BATCH), workers or cores()):
            words.update(counts)
            add(sum(len(word) * n for word, n in counts.items()))
        merges = learn_merges(words, n_merges, show("merges", n_merges))
        if len(merges) < n_merges:
            print(f"bpe.py: the text has only {len(merges)} pairs to merge, so vocab_size is "
                  f"{vocab_size - n_merges + len(merges)}, not {vocab_size}", file=sys.stderr)
        return cls(merges, pattern, special_tokens)

    @functools.cached_property
    def _engine(self):
        import tiktoken
        return tiktoken.Encoding("bpe.py", pat_str=self.pattern, mergeable_ranks=self._tokens, special_tokens=self.special_tokens)

    @functools.cached_property
    def _pairs(self):
        """Sorted keys (left << 32 | right) of the pairs that merge, and the ids they make; at the end a key that never occurs."""
        key = np.array([left << 32 | right for left, right in self._joins], np.int64)
        made = np.array([self._tokens[self.vocab[left] + self.vocab[right]] for left, right in self._joins], np.int64)
        order = np.argsort(key)
        return np.append(key[order], -1), np.append(made[order], NONE)

    def _makes(self, left, right):
        """Two arrays of ids -> the id that each pair merges into, or NONE."""
        (keys, made), key = self._pairs, left << 32 | right
        found = np.searchsorted(keys[:-1], key)
        return np.where(keys[found] == key, made[found], NONE)

    @functools.cached_property
    def _bytes(self):
        """The ids of the 256 bytes, and a table of what any two of them make: in the first round faster than a search."""
        ids = np.array([self._tokens[bytes([b])] for b in range(256)])
        return ids, self._makes(ids[:, None], ids)

    def _merge(self, words):
        """words -> (their ids end to end, how many each has): [b"aaa", b"a"] -> [256 97 97], [2 1] if merge 0 is (97, 97).
        A word that is a token becomes that token. The others merge together: in each round, every word merges its pair that makes
        the lowest id, the leftmost if there are several, until none of its pairs is a token."""
        ready, rest = [], []
        for i, word in enumerate(words):
            if (token := self._tokens.get(word)) is not None: ready.append((i, token))
            elif len(word) <= LONG: rest.append(i)
            else: ready += [(i, t) for t in self._engine._encode_single_piece(word)]    # rounds would take quadratic time
        done = [np.array(ready, np.int64).reshape(-1, 2).T]                 # final: (number of the word, id)
        who, size = np.array(rest, np.int64), np.array([len(words[i]) for i in rest], np.int64)
        text, (byte, two_bytes) = np.frombuffer(b"".join([words[i] for i in rest]), np.uint8), self._bytes
        ids, pair = byte[text], two_bytes[text, np.append(text[1:], 0)]     # pair[i]: what ids[i] and ids[i + 1] make
        pair[np.cumsum(size) - 1] = NONE                                    # the last id of a word has no next one
        while len(who):
            begin = np.cumsum(size) - size
            best = np.minimum.reduceat(pair << 32 | np.arange(len(pair)), begin)    # of each word: lowest id, then its place
            live = best < NONE << 32                                        # words that can merge; the others are done
            over, at = np.repeat(~live, size), best[live] & 0xFFFFFFFF
            done.append((np.repeat(who[~live], size[~live]), ids[over]))
            ids[at], stay, offset = pair[at], ~over, at - begin[live]       # offset: of the merged ids in their words
            stay[at + 1] = False
            who, size, ids, pair = who[live], size[live] - 1, ids[stay], pair[stay]
            at = np.cumsum(size) - size + offset                            # where they are now: new pairs are only beside them
            near = np.append(at[offset > 0] - 1, at[offset < size - 1])
            pair[at] = NONE                                                 # stays so at the end of a word
            pair[near] = self._makes(ids[near], ids[near + 1])
        owner, ids = map(np.concatenate, zip(*done))
        return ids[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=len(words))

    def _encode(self, pieces):
        """Yield an array of ids for each piece of text, in order.

        The cache is (words, start, ids): word i has ids[start[i]:start[i + 1]]. A batch takes it away and puts it back complete:
        an interrupt loses it instead of damaging it, and a text encoded between two yields or by another thread has its own."""
        for batch in groups(map(nfc, pieces) if self.normalizer else pieces, 64 * CHUNK):
            narrow = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
            words, start, ids = vars(self).pop("_cache", None) or (Words(), np.zeros(1, np.int64), np.zeros(0, narrow))
            known, chunks = len(words), []
            for group in groups(batch, CHUNK):
                raw, starts, lens, ends = split(group, self.pattern)
                chunks.append((words.number(raw, starts, lens), ends))
            if new := list(itertools.islice(reversed(words), len(words) - known))[::-1]:    # words[known:]; a dict has no slices
                more, sizes = self._merge(new)
                start, ids = np.append(start, start[-1] + np.cumsum(sizes)), np.append(ids, more.astype(narrow))
            if len(words) <= CACHE and len(ids) <= 8 * CACHE: self._cache = words, start, ids
            for numbers, ends in chunks:
                first, size = start[numbers], start[numbers + 1] - start[numbers]
                end = np.cumsum(size)
                joined = ids[np.repeat(first - (end - size), size) + np.arange(size.sum())]     # each word's ids, end to end
                yield from np.split(joined, np.append(0, end)[ends[:-1]])

    def _parts(self, text, special):
        """text -> [ordinary text, special token, ordinary text, ...] as bytes."""
        tokens, text = sorted(map(as_bytes, special), key=len, reverse=True), as_bytes(text)
        return re.split(b"(" + b"|".join(map(re.escape, tokens)) + b")", text) if any(t in text for t in tokens) else [text]

    def encode(self, text, allowed_special=()):
        """str or bytes -> list of ids. Special tokens in allowed_special, or "all", get their id; others are plain text."""
        allowed = self.special_tokens if allowed_special == "all" else allowed_special
        if isinstance(allowed, str): raise ValueError(f"allowed_special={allowed!r}: want \"all\" or a list of special tokens")
        allowed = list(allowed)
        if unknown := [name for name in allowed if name not in self.special_tokens]:
            raise ValueError(f"allowed_special has {unknown[0]!r}, which is not one of {list(self.special_tokens)}")
        parts = self._parts(text, allowed)
        parts[::2] = [ids.tolist() for ids in self.encode_batch(parts[::2])]
        parts[1::2] = [[self.special_tokens[name.decode()]] for name in parts[1::2]]
        return list(itertools.chain(*parts))

    def encode_batch(self, texts):
        """Iterable of str or bytes -> list of arrays of ids, uint16 if the vocabulary fits, else uint32. No special tokens."""
        if isinstance(texts, TEXT): raise ValueError(f"want a list of texts, not one ({texts[:20]!r}): encode takes one")
        sizes = []
        def pieces():
            for text in texts:
                sizes.append(0)
                for piece in cut([text]):
                    sizes[-1] += 1
                    yield piece
        arrays = iter(list(self._encode(pieces())))     # sizes is complete after this
        return [next(arrays) if n == 1 else np.concatenate(list(itertools.islice(arrays, n))) for n in sizes]

    def encode_iterable(self, lines):
        """Parts of one text (str or bytes; an open file, say) -> the ids of the whole text, one by one, in bounded memory."""
        for ids in self._encode(cut(lines)): yield from ids.tolist()

    def decode_bytes(self, ids):
        """ids (any iterable of int) -> bytes. Raises ValueError for an id that is not a token."""
        try: return b"".join([self.vocab[i] for i in (ids.tolist() if hasattr(ids, "tolist") else map(operator.index, ids))])
        except KeyError as e: raise ValueError(f"token id {e.args[0]} is not in the vocabulary of {self.vocab_size}") from None

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_stream(self, ids):
        """Yields text as ids arrive, holding back the bytes of a character until it is whole."""
        return codecs.iterdecode((self.decode_bytes([i]) for i in ids), "utf-8", "replace")

    # Files. `save` writes to_dict() as JSON; a checkpoint carries the dict itself.

    @functools.cached_property
    def hash(self):
        what = [self.pattern, self.special_tokens, self.normalizer, sorted((i, token.hex()) for token, i in self._tokens.items())]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def to_dict(self):
        tokens = None if self._own else {letters(token): i for token, i in self._tokens.items()}
        return {"pattern": self.pattern, "special_tokens": dict(self.special_tokens), "normalizer": self.normalizer,
                "merges": list(map(list, self.merges)), "tokens": tokens, "hash": self.hash}

    @classmethod
    def from_dict(cls, d):
        try:
            tokens = d["tokens"] and {to_bytes(t): i for t, i in d["tokens"].items()}
            tok = cls(d["merges"], d["pattern"], dict(d["special_tokens"]), tokens, d["normalizer"])
        except (LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"not a tokenizer of bpe.py: {type(e).__name__} {e}") from None
        if tok.hash != d["hash"]:
            raise ValueError(f"damaged tokenizer: its hash is {tok.hash[:12]}, not {str(d['hash'])[:12]} as recorded")
        return tok

    def __reduce__(self): return type(self).from_dict, (self.to_dict(),)    # pickle and copy leave caches behind
    def save(self, path): write_json(path, self.to_dict())

    @classmethod
    def load(cls, path):
        """Read a file of `save` or a Hugging Face tokenizer.json. Raises ValueError if it is neither, or damaged."""
        def is_hf(text):
            d = json.loads(text) if text.lstrip()[:1] == "{" else {}
            if isinstance(d.get("model", d.get("special_tokens")), dict): return "model" in d       # ours has no "model"
            raise ValueError("want a file of Tokenizer.save or a Hugging Face tokenizer.json; GPT-2's merges.txt becomes one by "
                             "Tokenizer.from_gpt2('merges.txt').save('gpt2.json')")
        return cls.from_hf(path) if read(path, is_hf) else read(path, lambda text: cls.from_dict(json.loads(text)))

    def to_tiktoken(self):
        """-> tiktoken.Encoding with the same vocabulary, pattern and special tokens."""
        if self.normalizer: raise ValueError("this tokenizer normalizes to NFC, which tiktoken cannot: there is no conversion")
        return self._engine

    @classmethod
    def from_tiktoken(cls, source, pattern=GPT2_SPLIT, special_tokens=()):
        """A tiktoken.Encoding, with its own pattern and special tokens, or the path of a rank file (base64 and rank per line)."""
        if hasattr(source, "_mergeable_ranks"): return cls([], source._pat_str, source._special_tokens, source._mergeable_ranks)
        return read(source, lambda text: cls([], pattern, special_tokens, {
            base64.b64decode(token, validate=True): int(i) for token, i in map(str.split, filter(str.strip, text.splitlines()))}))

    @classmethod
    def gpt2(cls):
        """GPT-2's vocabulary, from tiktoken's download or its cache. Raises ValueError if it has neither."""
        import tiktoken
        try: return cls.from_tiktoken(tiktoken.get_encoding("gpt2"))
        except OSError as e:    # what requests raises is an OSError
            raise ValueError(f"cannot get GPT-2's vocabulary ({type(e).__name__}): go online once, train your own, or save its "
                             "merges.txt for --tokenizer: Tokenizer.from_gpt2('merges.txt').save('gpt2.json')") from None

    @classmethod
    def from_merges(cls, vocab, merges, whole=False, pattern=GPT2_SPLIT, special_tokens=(), normalizer=None):
        """vocab: dict token -> id; merges: pairs of tokens, in order; tokens are spelled in LETTERS, as in the files. whole: a
        word that is a token becomes that token without merging. We use the tokens alone, as tiktoken does. ValueError unless
        that gives the same ids: as training leaves a file, with one merge for each token, the last on the way to it, in the
        order of ids; or, if whole, with every merge that could be, in the order of the ids they make."""
        try:
            tokens, merges = {to_bytes(t): i for t, i in vocab.items()}, [(to_bytes(a), to_bytes(b)) for a, b in merges]
            makes, pairs = [tokens[a + b] for a, b in merges], [(tokens[a], tokens[b]) for a, b in merges]
        except KeyError as e: raise ValueError(f"token {e.args[0]!r} is missing: not byte-level BPE, or a damaged file") from None
        tok = cls([], pattern, special_tokens, tokens, normalizer)
        trained = len(pairs) == len(tokens) - 256 and pairs == tok.merges
        if not trained and not (whole and makes == sorted(makes) and {*pairs} == {*tok._joins}):
            raise ValueError("its merges are not those of its ids, in the order of the ids: such a tokenizer cannot be read")
        return tok

    @classmethod
    def from_gpt2(cls, merges_path, vocab_path=None):
        """GPT-2's published merges.txt (vocab.bpe) and vocab.json (encoder.json); without the latter, GPT-2's numbering."""
        def parse(text):
            merges = [line.split(" ") for line in text.split("\n") if line and not line.startswith("#version")]
            tokens = [*LETTERS.values(), *(a + b for a, b in merges), ENDOFTEXT]
            vocab = read(vocab_path, json.loads) if vocab_path else dict(zip(tokens, range(len(tokens))))
            special = {ENDOFTEXT: vocab.pop(ENDOFTEXT)} if ENDOFTEXT in vocab else {}
            return cls.from_merges(vocab, merges, special_tokens=special)
        return read(merges_path, parse)

    def to_hf(self, path, first=None):
        """Write a Hugging Face tokenizer.json. first: a special token that it shall put before every text."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.pattern == GPT2_SPLIT}
        pattern = CL100K_HF if self.pattern == CL100K_SPLIT else self.pattern
        regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        names, trained = {letters(token): i for token, i in self._tokens.items()}, len(self.merges) == len(self._tokens) - 256
        merges = self.merges if trained else self._joins        # see from_merges
        if clash := [t for t in self.special_tokens if t in names]:
            raise ValueError(f"Hugging Face's file cannot hold the special token {clash[0]!r}: an ordinary token is spelled so")
        one, two = ([{"SpecialToken": {"id": first, "type_id": n}}, {"Sequence": {"id": "AB"[n], "type_id": n}}] for n in (0, 1))
        template = {"type": "TemplateProcessing", "single": one, "pair": one + two, "special_tokens": {
            first: {"id": first, "ids": [self.special_tokens.get(first)], "tokens": [first]}}}
        write_json(path, {
            "version": "1.0", "truncation": None, "padding": None, "decoder": level, "post_processor": first and template,
            "added_tokens": [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                             for t, i in self.special_tokens.items()],
            "normalizer": {"type": self.normalizer} if self.normalizer else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [level] if level["use_regex"] else [regex, level]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": not trained,
                      "vocab": names | self.special_tokens,     # special ones, too, or they would get new ids
                      "merges": [[letters(self.vocab[a]), letters(self.vocab[b])] for a, b in merges]}})

    @classmethod
    def from_hf(cls, path):
        """Read a Hugging Face tokenizer.json: byte-level BPE with a pattern that __init__ takes (GPT-2, Llama 3, Qwen, ...).
        Added tokens become special tokens; what a post-processor adds, such as a first token, is left to the caller."""
        def parse(text):
            d = json.loads(text)
            model, norm = d["model"], (d.get("normalizer") or {}).get("type")
            steps = d.get("pre_tokenizer") or {"type": "missing"}
            steps = steps.get("pretokenizers", [steps])
            cuts = [s["pattern"].get("Regex") if s["behavior"] == "Isolated" and not s["invert"] else str(s)
                    for s in steps if s["type"] == "Split"]
            cuts += [GPT2_SPLIT for s in steps if s["type"] == "ByteLevel" and s.get("use_regex", True)]
            wrong = [f"its {what} is {x!r}" for what, x, *ok in [       # ok: the values that can be read
                ("model", model.get("type", "BPE"), "BPE"), ("number of split patterns", len(cuts), 1),
                ("byte_fallback (SentencePiece's)", model.get("byte_fallback", False), False), ("normalizer", norm, None, "NFC"),
                ("pre-tokenizer", ", ".join(s["type"] for s in steps), "ByteLevel", "Split, ByteLevel"),
                *[("prefix space", s.get("add_prefix_space", False), False) for s in steps],
                *[(key, model.get(key) or None, None) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")],
                *[(f"added token {t['content']!r}", key, None) for t in d.get("added_tokens", [])
                  for key in ("lstrip", "rstrip", "single_word") if t.get(key)],
                *[("added white space", t["content"], None) for t in d.get("added_tokens", [])      # HF cuts it out of any text
                  if t["content"].isspace() and not t.get("special")]] if x not in ok]
            if wrong:
                raise ValueError(f"{', '.join(wrong)}: can read only byte-level BPE, one split pattern, and NFC or no normalizer")
            special = {t["content"]: t["id"] for t in d.get("added_tokens", [])}
            vocab = {t: i for t, i in model["vocab"].items() if t not in special}
            merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            return cls.from_merges(vocab, merges, model.get("ignore_merges"), cuts[0], special, norm)
        return read(path, parse)

# ---- Command line -------------------------------------------------------------------------------------------------------------

def main(argv=None):
    import argparse
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on files, each one document.")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--vocab_size", type=int, default=4096, help="number of ids, bytes and special tokens included")
    parser.add_argument("--out", default="tok.json", help="file to write")
    parser.add_argument("--pattern", default="gpt2", choices=["gpt2", "gpt4"], help="how text is split into words")
    parser.add_argument("--special", default=ENDOFTEXT, help="special tokens, separated by commas; in files they are text")
    parser.add_argument("--workers", type=int, help="processes that count words (default: one per core)")
    a = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="backslashreplace")    # for file names it cannot encode
    sys.stderr = sys.stderr or open(os.devnull, "w")        # it is None when closed by 2>&-
    try:
        began, total = time.time(), sum(map(os.path.getsize, a.files))
        for path in a.files:
            if not os.path.isfile(path): raise ValueError(f"{path} is a folder or a pipe: name files")
            with open(path, "rb") as f: head = f.read(1024)
            if utf16(head) or path.lower().endswith((".jsonl", ".gz", ".parquet")):
                raise ValueError(f"{path} is not UTF-8 text: convert it (.jsonl is for prepare.py --input, which trains, too)")
        if not total: raise ValueError(f"there is no text in {', '.join(a.files)}")
        if os.path.isdir(a.out or ".") or a.out in a.files or not os.access(os.path.dirname(a.out) or ".", os.W_OK):
            raise ValueError(f"--out={a.out} must be a file of its own, in a folder that exists and can be written to")
        def parts(path):
            with open(path, "rb") as f: yield from iter(functools.partial(f.read, CHUNK), b"")
        pattern, special = GPT2_SPLIT if a.pattern == "gpt2" else GPT4_SPLIT, [s for s in a.special.split(",") if s]
        tok = Tokenizer.train(map(parts, a.files), a.vocab_size, pattern, special, a.workers, verbose=True, n_bytes=total)
        tok.save(a.out)
        with open(a.files[0], "rb") as f: sample = f.read(1 << 20)
        ratio, seconds = len(sample) / max(1, len(tok.encode_batch([sample])[0])), time.time() - began
        print(f"{a.out}: {len(tok.merges):,} merges, vocab_size {tok.vocab_size:,}; {total / 1e6:.1f} MB in {seconds:.2f} s; "
              f"{ratio:.2f} bytes per token")
    except (ValueError, OSError) as e: sys.exit(f"error: {e}")
    except KeyboardInterrupt: sys.exit("error: interrupted, nothing written")

if __name__ == "__main__": main()
