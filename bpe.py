"""
Byte-level byte pair encoding (BPE): train a tokenizer, encode, decode. One file, numpy whole-array operations.

Split the text into words by a regular expression; a word starts as its UTF-8 bytes, ids 0..255. Training: again and again take
the most frequent pair of neighbouring ids and give it the next id. Encoding: in each word merge the pair learned first, until
none is left.

    python bpe.py input.txt --vocab_size=4096 --out=tok.json        # then, in Python:
    tok = Tokenizer.load("tok.json"); ids = tok.encode("hello"); text = tok.decode(ids)

Fast, because words are found, looked up and counted with array operations on a chunk of text, and pairs are merged many at a
time wherever this provably equals one at a time (`learn_merges`). The encoder merges a word once, however often it occurs, and
all new words of a batch together. Ids equal tiktoken's, merges rustbpe's: between equally frequent pairs the smallest (left id,
right id) wins. A byte that is not valid UTF-8 is kept, as a character that is neither letter, number nor space:
decode_bytes(encode(b)) == b for any bytes, unless a normalizer is set. In a str, lone surrogates become U+FFFD, as in tiktoken.

References: Sennrich, Haddow, Birch 2016 (arXiv:1508.07909); Radford et al. 2019 (GPT-2: bytes, split pattern, merges file);
tiktoken (GPT-4's pattern, rank files); minbpe and rustbpe, A. Karpathy (the plain algorithm; the tie rule).
"""
# Notation: a word is what the pattern cuts out of the text; starts and lens are the words' offsets and lengths in bytes.
import base64, codecs, collections, functools, hashlib, itertools, json, os, re, signal, sys, threading, time, unicodedata
import numpy as np

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
# relatives of GPT-4's: in tiktoken's cl100k_base white space at the end of the text is one word; in Qwen's every digit is
CL100K_SPLIT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
                r"|\s+(?!\S)|\s")
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K_HF = CL100K_SPLIT.replace("{1,3}+", "{1,3}")    # the same, for Hugging Face's engine: there {1,3}+ may repeat
SAME_SPLIT = {CL100K_HF: CL100K_SPLIT,    # what others write: this, Llama 3's pattern, and GPT-2's in tiktoken
              QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"): GPT4_SPLIT,
              r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2_SPLIT}
ENDOFTEXT = "<|endoftext|>"
CHUNK = 1 << 18            # bytes split at once: their arrays stay in the cache
BATCH = 1 << 23            # bytes sent to a worker process at once
SLOTS = 19                 # 2^SLOTS words are found at once, by array operations
CACHE = 1 << 20            # words whose ids the encoder remembers
HOT = 1024                 # pairs the trainer keeps in sight
LONG = 64                  # bytes; longer words are rare: their keys are made by Python's hash, tiktoken's engine merges them
NONE = np.iinfo(np.int32).max

# ---- Text to words ------------------------------------------------------------------------------------------------------------

SPACE, WHITE, NEWLINE, LETTER, NUMBER, OTHER, EDGE, UNKNOWN = range(8)   # classes of characters; an EDGE parts two texts
CLASS = np.full(0x110000, UNKNOWN, np.uint8)   # of code points, those beyond ASCII found when they first occur
CLASS[:128] = [SPACE if c == " " else NEWLINE if c in "\r\n" else WHITE if c in "\t\v\f" else
               LETTER if c.isalpha() else NUMBER if c.isdigit() else OTHER for c in map(chr, range(128))]
CLASS[0xD800:0xE000] = OTHER                   # stand for bytes that are not UTF-8

def classes(code):
    """Class of each code point. New ones are asked of tiktoken's own engine: other Unicode versions differ in 17,000 of them."""
    found = CLASS.take(code)
    if (found == UNKNOWN).any():
        import tiktoken
        new = np.add.outer(np.unique(code[found == UNKNOWN] >> 10) << 10, np.arange(1 << 10, dtype="<u4"))   # and those near
        new = new[CLASS[new] == UNKNOWN]
        text, CLASS[new], ranks = new.tobytes().decode("utf-32-le"), OTHER, {bytes([i]): i for i in range(256)}
        for cls, regex in (LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (WHITE, r"\s+"):
            plain = tiktoken.Encoding("bytes", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
            matched = bytes(plain.encode_ordinary(text)).decode()    # the rest gives no tokens
            CLASS[np.frombuffer(matched.encode("utf-32-le"), "<u4")] = cls
        found = CLASS.take(code)
    return found

def code_points(raw):
    """bytes -> the code point of each character, and its offset. A byte that is not UTF-8 is one too, at 0xDC00 and up."""
    if raw.isascii(): return np.frombuffer(raw, np.uint8), np.arange(len(raw))
    code = np.frombuffer(raw.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), "<u4")
    size = 1 + (code >= 0x80).view(np.uint8) + (code >= 0x800) + (code >= 0x10000)
    size[(code >= 0xDC80) & (code < 0xDD00)] = 1
    return code, np.cumsum(size, dtype=np.int64) - size

def split_gpt2(c):
    """Classes of a text's characters -> True where a word starts; of contractions it knows nothing."""
    white, before, after, start = c <= NEWLINE, c[:-1], c[1:], np.ones(len(c), bool)
    # a word is a run of one class with at most one space before it; white space leaves its last character to what follows
    start[1:] = np.where(white[1:], ~white[:-1], (before != after) & (before != SPACE))
    start[:-1] |= white[:-1] & ~white[1:] & (after != EDGE)
    return start

def split_gpt4(c, pattern):
    """The same for GPT-4's pattern and its relatives."""
    before, after, start = c[:-1], c[1:], np.ones(len(c), bool)
    joins = ((before <= NEWLINE) & (after <= NEWLINE) | (before == OTHER) & (after == NEWLINE)   # punctuation takes its newlines
             | (before == SPACE) & (after == OTHER) | (before <= WHITE) & (after == LETTER))
    start[1:] = (before != after) & ~joins
    # Blanks, white space without newlines, are one word with a newline after them. The last one before a word stands apart or
    # joins that word. Every text ends in an EDGE, so c[-1] is one, as before the first character.
    (blanks, end), (line, rest) = (np.flatnonzero(np.diff(k, prepend=False)).reshape(-1, 2).T for k in (c <= WHITE, c == NEWLINE))
    start[rest[c[line - 1] == OTHER]] = True    # what follows newlines that punctuation took
    start[blanks[(c[end] > NEWLINE) & (c[end] <= (OTHER if pattern == CL100K_SPLIT else EDGE))]] = True
    start[(end - 1)[(c[end] > NEWLINE) & (c[end] < EDGE)]] = True
    start[1:] &= ~((before == OTHER) & (after == LETTER) & start[:-1])   # one character joins letters, unless a space took it
    digit, most = np.flatnonzero(c == NUMBER), 1 if pattern == QWEN_SPLIT else 3
    first = np.flatnonzero(start[digit])    # of each number; then every third, or every one
    start[digit] = (np.arange(len(digit)) - np.repeat(first, np.diff(first, append=len(digit)))) % most == 0
    return start

def contractions(start, code, fold):
    """Where a word starts so, make 's 'd 'm 't 'll 've 're a word. fold: ignore case; then U+017F, the long s, is an s, too."""
    at = np.flatnonzero((code == ord("'")) & start)
    a, b = (code[np.minimum(at + i, len(code) - 1)] for i in (1, 2))
    if fold: a, b = np.where(a == 0x17F, ord("s"), a | 0x20), b | 0x20
    one = np.logical_or.reduce([a == ord(x) for x in "sdmt"])
    two = np.logical_or.reduce([(a == ord(x)) & (b == ord(y)) for x, y in ("ll", "ve", "re")])
    for found, size in (at[one], 2), (at[two], 3): start[found + 1], start[found + size] = False, True

def split(texts, pattern):
    """list of bytes -> (their bytes in one piece, starts and lens of the words, number of words up to the end of each text)."""
    raw = b"\n".join([*texts, b""])
    edges = np.cumsum([len(text) + 1 for text in texts]) - 1   # the "\n" put in after each text: they belong to no word
    code, offset = code_points(raw)
    edge = np.searchsorted(offset, edges)
    c = classes(code)
    c[edge] = EDGE
    start = split_gpt2(c) if pattern == GPT2_SPLIT else split_gpt4(c, pattern)
    contractions(start, code, fold=pattern != GPT2_SPLIT)
    start[edge] = True
    starts = offset[np.flatnonzero(start)]
    drop = np.searchsorted(starts, edges)
    return raw, np.delete(starts, drop), np.delete(np.diff(starts, append=len(raw)), drop), drop - np.arange(len(drop))

def as_bytes(text):
    try: return text.encode() if isinstance(text, str) else b"".join([text])    # bytes(7) would be 7 zeros
    except UnicodeEncodeError:   # lone surrogates
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()

def nfc(text):
    return unicodedata.normalize("NFC", text.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

def last_place(text):
    """bytes -> the offset of the last place in them where a text may be cut whatever stands around, or 0 if there is none: every
    pattern finds the words of the whole in its parts, and the normal form C of the whole is that of the parts."""
    code, offset = code_points(text)
    c = classes(code)
    # No pattern looks back, and only white space looks ahead. Elsewhere a word goes on into another class only from punctuation,
    # to letters and newlines.
    before, after, left, right = c[:-1], c[1:], code[:-1], code[1:]
    place = (before > NEWLINE) & (after != before) & ~((before == OTHER) & ((after == LETTER) | (after == NEWLINE)))
    place &= (right < 0x300) | (right >= 0x3000) & (right < 0x302A)     # nothing composes with these; nor is one half a character
    place &= (after <= WHITE) | (left < 0x900) | (left >= 0x3000) & (left < 0xD800)     # others it may take apart, such as U+0958
    place[:3] = False                                                   # the text may begin with the rest of one
    return offset.item(np.flatnonzero(place)[-1] + 1) if place.any() else 0

def cut(blocks):
    """The parts, str or bytes, of one text -> pieces of about CHUNK bytes whose words together are the words of the whole, by any
    pattern. Longer only where there is no place to cut: inside a word, white space, lines of nothing but punctuation."""
    held, want = bytearray(), CHUNK
    for block in map(as_bytes, blocks):
        for i in range(0, len(block), CHUNK):
            held += block[i:i + CHUNK]
            if len(held) < want: continue
            tail = bytes(held[-1024:])
            if place := last_place(tail):
                at = len(held) - len(tail) + place
                yield bytes(held[:at])
                del held[:at]
            want = len(held) + CHUNK
    yield bytes(held)

def groups(items, size, length=len):
    """Lists of consecutive items, about `size` bytes each."""
    total = 0
    def number(item):
        nonlocal total
        total += length(item) + 1       # of empty ones there must not be too many, either
        return total // size
    for _, group in itertools.groupby(items, number): yield list(group)

# ---- Words to numbers ---------------------------------------------------------------------------------------------------------

U = np.uint64
MIX = np.frombuffer(os.urandom(24), U) | U(1)
KEEP = np.array([(1 << 8 * i) - 1 for i in range(9)], U)   # KEEP[i] keeps the first i bytes

def word_keys(raw, starts, lens):
    """A uint64 for every word. Up to 7 bytes it is the word itself, its length in the top byte; a longer word gets a 63-bit hash
    under multipliers drawn at random by each process: among a million distinct words two collide with a probability of 1e-7."""
    eight = np.ndarray(len(raw), "<u8", raw + bytes(7), strides=(1,))    # the 8 bytes from any offset
    keys = eight[starts] & KEEP[np.minimum(lens, 8)] | lens.astype(U) << U(56)
    go = np.flatnonzero(lens > 7)
    keys[go] = lens[go].astype(U) * MIX[2]
    for i in range(0, LONG, 8):
        block = eight[starts[go] + i] & KEEP[np.minimum(lens[go] - i, 8)]
        h = (keys[go] ^ block) * MIX[0]
        keys[go] = (h ^ h >> U(32)) * MIX[1] | U(1 << 63)
        go = go[lens[go] > i + 8]
    for word in go: keys[word] = hash(raw[starts[word]:starts[word] + lens[word]]) & (1 << 63) - 1 | 1 << 63
    return keys

class Words(dict):
    """Distinct words, bytes -> number, in the order they come. Before the dict, which takes one Python object at a time, stands
    a table for whole arrays: the slot that a word's key tells holds the key and number of the last word that wanted it."""

    def __init__(self):
        self.keys_in, self.numbers_in = np.zeros(1 << SLOTS, U), np.zeros(1 << SLOTS, np.int64)

    def number(self, raw, starts, lens):
        """Numbers of words; those that are new get one."""
        keys = word_keys(raw, starts, lens)
        slot = (keys * MIX[2] >> U(64 - SLOTS)).view(np.int64)
        numbers, todo = self.numbers_in.take(slot), np.flatnonzero(self.keys_in.take(slot) != keys)
        while len(todo):
            self.keys_in[slot[todo]] = keys[todo]    # of different words for one slot the last one stays, the others come next
            there = self.keys_in[slot[todo]] == keys[todo]
            same, todo = todo[there], todo[~there]
            self.numbers_in[slot[same]] = same       # of equal words one goes to the dict for all
            one = same[self.numbers_in[slot[same]] == same]
            texts = [raw[i:i + n] for i, n in zip(starts[one].tolist(), lens[one].tolist())]
            self.numbers_in[slot[one]] = [self.setdefault(text, len(self)) for text in texts]
            numbers[same] = self.numbers_in[slot[same]]
        return numbers

def work(function, pipe):
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends a worker at once; the parent says so. And should it be killed:
    import multiprocessing
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    while True:
        try: job = pipe.recv()
        except EOFError: return             # there is nothing more to do
        try: result = function(job), None
        except Exception as e: result = None, e
        pipe.send(result)

def start(process):
    """Start it, and let Ctrl-C wait: in the middle of a fork Python would print a traceback of it, or lose it. A mask would not
    do, for other threads take the signal; and only the main one hears of it."""
    if threading.current_thread() is not threading.main_thread(): return process.start()
    came = []
    before = signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try: process.start()
    finally: signal.signal(signal.SIGINT, before)
    if came: signal.raise_signal(signal.SIGINT)

def talk(do, *what):
    """do(*what), which sends or receives; at the other end of a pipe a worker may have died, even halfway through a message."""
    try: return do(*what)
    except (EOFError, OSError):
        raise OSError("a worker process died, for want of memory? Run again with --workers=1") from None

def in_order(function, jobs, workers):
    """Yield function(job) for each job, in order, computed by `workers` processes, each at one job: memory is bounded. OSError
    if a process dies. A pipe for each, for whoever died while writing to one of all (concurrent.futures) would block the rest."""
    jobs = iter(jobs)
    head = list(itertools.islice(jobs, 3))
    jobs, team, busy = itertools.chain(head, jobs), [], collections.deque()
    if workers == 1 or len(head) < 3:    # to start processes would take longer
        yield from map(function, jobs)
        return
    import multiprocessing
    # fork where it is safe: a spawned worker imports the caller's script again, and with train.py that is all of torch
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        for job in itertools.islice(jobs, workers):
            pipe, its = context.Pipe()
            team.append(context.Process(target=work, args=(function, its), daemon=True))
            start(team[-1])
            its.close()     # now a worker's death is the end of its pipe
            talk(pipe.send, job)
            busy.append(pipe)
        while busy:
            pipe = busy.popleft()
            result, error = talk(pipe.recv)
            if error: raise error
            for job in itertools.islice(jobs, 1):
                talk(pipe.send, job)
                busy.append(pipe)
            yield result
    finally:
        for process in filter(lambda process: process.pid, team):
            process.kill()
            process.join()

def count_words(pieces, pattern):
    """list of bytes -> dict of distinct words with their counts; runs in a worker."""
    words = Words()
    numbers = [words.number(*split(group, pattern)[:3]) for group in groups(pieces, CHUNK)]
    return dict(zip(words, np.bincount(np.concatenate(numbers)).tolist()))

# ---- Merging ------------------------------------------------------------------------------------------------------------------

class Pairs:
    """The neighbouring pairs in a dict of words with their counts: key (left << 32 | right), count, and where they are.

    The words stand in linked lists (sym, nxt, prv) with a separator -1 around each. pid[pos] is the pair that starts at pos, so
    a position that has changed since it was stored shows in one comparison. Pair p is at pool[begin[p]:begin[p + 1]]. A merge
    takes one symbol away and enters at most two positions: thrice the text is room enough, and what is not used costs nothing.
    """

    def __init__(self, words):
        lens, counts = (np.fromiter(numbers, np.int64, len(words)) for numbers in (map(len, words), words.values()))
        text = np.frombuffer(b"".join(words), np.uint8).astype(np.int32)
        self.sym = np.insert(text, np.append(0, np.cumsum(lens)), -1)
        n = len(self.sym)
        self.nxt, self.prv = np.arange(1, n + 1, dtype=np.int32), np.arange(-1, n - 1, dtype=np.int32)
        self.weight = np.append(0, np.repeat(counts, lens + 1))    # how often the word around a position occurs
        self.pid = np.full(n, -1, np.int32)
        self.n, self.pool = 0, np.zeros(3 * n, np.int32)
        self.key, self.count, self.begin = np.zeros((3, 3 * n), np.int64)
        self.store(np.arange(n - 1, dtype=np.int32))

    def store(self, at):
        """Enter the pairs that start at these positions, all new; -> their numbers."""
        key = self.sym[at].astype(np.int64) << 32 | self.sym[self.nxt[at]]
        at, key = at[key >= 0], key[key >= 0]   # a separator makes it negative
        # of bytes there are few pairs: a radix sort
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
        """Replace pairs by the symbols base, base + 1, ...; -> the numbers of the pairs this makes."""
        parts = [self.pool[i:j] for i, j in zip(self.begin[pairs].tolist(), self.begin[pairs + 1].tolist())]
        pos, who = np.concatenate(parts), np.repeat(np.arange(len(pairs)), list(map(len, parts)))
        live = np.flatnonzero(self.pid[pos] == pairs[who])
        pos, who = pos[live], who[live]
        if len(pairs) == 1:    # it may be (a, a), of which each overlaps the next: keep the first, third, ... of each run
            pos = np.sort(pos)
            i, alone = np.arange(len(pos)), self.prv[pos] != np.append(-1, pos[:-1])
            pos = pos[(i - np.maximum.accumulate(np.where(alone, i, 0))) % 2 == 0]
            who = who[:len(pos)]
        right, w = self.nxt[pos], self.weight[pos]
        for beside in right, self.prv[pos]:    # the pairs around lose their occurrences; where there is none: -1, the unused last
            np.subtract.at(self.count, self.pid[beside], w)
            self.pid[beside] = -1
        self.count[pairs], self.pid[pos] = 0, -1
        after = self.nxt[right]
        self.sym[pos], self.sym[right], self.nxt[pos], self.prv[after] = base + who, -1, after, pos
        left = self.prv[pos]
        return self.store(np.append(left[self.sym[left] < base], pos))  # each position once

def learn_merges(words, n_merges, add=lambda n: None):
    """dict of words with their counts -> up to n_merges pairs (left id, right id), most frequent first.

    Many merges at a time. Let p1, p2, ... be the pairs in order (count falling, then key rising). Merging p1 = (a, b) takes away
    pairs (x, a) and (b, y) only, and no old count ever rises, so p2 = (l, r) keeps its count and place if l != b and r != a. A
    new pair (x, ab) or (ab, y) is at most as frequent as the old (x, a) or (b, y) and has a larger key; so if it came before p2,
    the old one would too, and the old one touches p1. Hence: walk down the order, stop at the first pair that touches an earlier
    one, l == b or r == a, or that is (a, a), which overlaps itself and goes alone; what is passed is exactly what one merge at a
    time would take.

    A batch may end sooner: only the hot pairs, up to a `last` one, are looked at, and only the first of them put in order.
    """
    pairs, merges, hot = Pairs(words), [], []
    def first(count, key, n):   # the n first of some pairs
        top = np.flatnonzero(count >= max(1, np.partition(count, -n)[-n] if len(count) > n else 1))
        return top[np.lexsort((key[top], -count[top]))][:n]
    while len(merges) < n_merges:
        if not len(hot):
            hot = first(pairs.count[:pairs.n], pairs.key, HOT)
            if not len(hot): break  # every word is one token
            least, last = pairs.count[hot[-1]], pairs.key[hot[-1]]
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
        hot = hot[(count > least) | (count == least) & (pairs.key[hot] <= last)]
        merges += batch
        add(len(batch))
    return merges

# ---- The tokenizer ------------------------------------------------------------------------------------------------------------

class Tokenizer:
    """256 bytes, merges in the order learned, special tokens. Not thread-safe (encode keeps a cache).

    merges: list of (left id, right id); merge i makes the token 256 + i. Instead, tokens: dict bytes -> id, a vocabulary made
    elsewhere; then any two neighbours that are a token together may merge, lowest id first, and a word that is a token is that
    token, as in tiktoken. special_tokens: dict text -> id, or texts, which come last. vocab_size: the number of ids a model
    needs, special tokens included. normalizer: None, or "NFC", which encoding applies to the text first. vocab: dict id -> bytes
    of every token. hash: of the tokens and their ids, the special tokens, pattern and normalizer.
    """

    def __init__(self, merges, pattern=GPT2_SPLIT, special_tokens=(), tokens=None, normalizer=None):
        self.pattern, self.normalizer, self._own = SAME_SPLIT.get(pattern, pattern), normalizer, tokens is None
        if self.pattern not in (GPT2_SPLIT, GPT4_SPLIT, CL100K_SPLIT, QWEN_SPLIT) or normalizer not in (None, "NFC"):
            raise ValueError(f"split pattern {pattern!r} or normalizer {normalizer!r} is not supported: GPT2_SPLIT and None are")
        if self._own:
            self.merges, vocab = [tuple(pair) for pair in merges], {i: bytes([i]) for i in range(256)}
            for left, right in self.merges:
                if left not in vocab or right not in vocab:
                    raise ValueError(f"damaged merges: {left}, {right} are not two bytes or earlier merges")
                vocab[len(vocab)] = vocab[left] + vocab[right]
            tokens = {token: i for i, token in vocab.items()}
        if isinstance(special_tokens, str): raise ValueError(f"special_tokens={special_tokens!r}: want a list of texts or a dict")
        if not isinstance(special_tokens, dict):
            special_tokens = {t: max(tokens.values()) + 1 + i for i, t in enumerate(dict.fromkeys(special_tokens))}
        self._tokens, self.special_tokens = tokens, special_tokens
        self.vocab = {i: token for token, i in tokens.items()} | {i: as_bytes(t) for t, i in special_tokens.items()}
        self.vocab_size = max(self.vocab) + 1
        twice = self._own and len(tokens) < len(vocab) or len(self.vocab) < len(tokens) + len(special_tokens)   # a token; an id
        if twice or min(self.vocab) < 0 or "" in special_tokens or not all(bytes([b]) in tokens for b in range(256)):
            raise ValueError("every byte, merge and special token needs an id of its own, and a special token must not be empty")
        self._cache = None

    @functools.cached_property
    def merges(self):
        """Of a vocabulary made elsewhere: every two tokens that make a third, as pairs of ids, in the order of the thirds."""
        tokens = self._tokens
        return [(tokens[t[:i]], tokens[t[i:]]) for t in sorted(tokens, key=tokens.get) for i in range(1, len(t))
                if t[:i] in tokens and t[i:] in tokens]

    @classmethod
    def train(cls, docs, vocab_size, pattern=GPT2_SPLIT, special_tokens=(ENDOFTEXT,), workers=None, verbose=False, n_bytes=0):
        """Learn merges from documents; only the distinct words are held in memory.

        docs: any iterable of str, or bytes, or iterables of parts of one document (a file too large for memory, say). A special
        token in a str or bytes document is no text: it parts it, as the end of a document does. vocab_size: the number of ids,
        bytes and special tokens included; 256 is the plain byte tokenizer, its special tokens on top. If the text has too few
        pairs, the vocabulary is smaller and a line on stderr says so. workers: processes that count; None: one per core.
        verbose: progress on stderr, with the time left if n_bytes says how much text there is. Raises ValueError for vocab_size
        < 256 or another pattern, OSError if a worker dies.
        """
        if (workers or 0) < 0: raise ValueError(f"workers is {workers}: want a number of processes, or none for one per core")
        plain, show = cls([], pattern, special_tokens), progress if verbose else lambda *a: lambda n: None
        if vocab_size < plain.vocab_size and vocab_size != 256:
            raise ValueError(f"vocab_size is {vocab_size}: bytes need 256, bytes and special tokens need {plain.vocab_size}")
        def pieces():
            for doc in [docs] if isinstance(docs, (str, bytes)) else docs:
                if not isinstance(doc, (str, bytes)): yield from cut(doc)
                else: yield from itertools.chain(*(cut([text]) for text in plain._parts(doc, plain.special_tokens)[::2]))
        n_merges, words = max(0, vocab_size - 256 - len(plain.special_tokens)), collections.Counter()
        add, count = show("MB counted", n_bytes, 1e6), functools.partial(count_words, pattern=plain.pattern)
        for counts in in_order(count, groups(pieces() if n_merges else (), BATCH), workers or os.cpu_count()):
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
        """Pairs of ids that merge (left << 32 | right), in rising order, and what they make; at the end one that never occurs."""
        key = np.array([left << 32 | right for left, right in self.merges], np.int64)
        made = np.array([self._tokens[self.vocab[left] + self.vocab[right]] for left, right in self.merges], np.int64)
        order = np.argsort(key)
        return np.append(key[order], -1), np.append(made[order], NONE)

    def _makes(self, left, right):
        """Arrays of ids -> what each two merge into, or NONE."""
        (keys, made), key = self._pairs, left << 32 | right
        found = np.searchsorted(keys[:-1], key)
        return np.where(keys[found] == key, made[found], NONE)

    @functools.cached_property
    def _bytes(self):
        """The ids of the 256 bytes, and what each two of them make: for the first look at a word faster than a search."""
        ids = np.array([self._tokens[bytes([b])] for b in range(256)])
        return ids, self._makes(ids[:, None], ids)

    def _merge(self, words):
        """
        list of words -> (their ids end to end, how many each has): [b"aaa", b"a"] -> [256 97 97], [2 1] if merge 0 is (97, 97).
        A word that is a token is that token. All others merge at once: in each round every word the first of those of its pairs
        that make the lowest id, until no pair of it is a token.
        """
        ready, rest = [], []
        for i, word in enumerate(words):
            if (token := self._tokens.get(word)) is not None: ready.append((i, token))
            elif len(word) <= LONG: rest.append(i)
            else: ready += [(i, t) for t in self._engine._encode_single_piece(word)]    # rounds would take quadratic time
        done = [np.array(ready, np.int64).reshape(-1, 2).T]                             # (words, ids) that are final
        who, size = np.array(rest, np.int64), np.array([len(words[i]) for i in rest], np.int64)
        text, (byte, of_bytes) = np.frombuffer(b"".join([words[i] for i in rest]), np.uint8), self._bytes
        ids, pair = byte[text], of_bytes[text, np.append(text[1:], 0)]      # pair: what an id makes with the next
        pair[np.cumsum(size) - 1] = NONE                                    # the last of a word has no next
        while len(who):
            begin = np.cumsum(size) - size
            best = np.minimum.reduceat(pair << 32 | np.arange(len(pair)), begin)
            live = best < NONE << 32                                        # words that can merge; the others are done
            over, at = np.repeat(~live, size), best[live] & 0xFFFFFFFF
            done.append((np.repeat(who[~live], size[~live]), ids[over]))
            ids[at], stay, offset = pair[at], ~over, at - begin[live]
            stay[at + 1] = False
            who, size, ids, pair = who[live], size[live] - 1, ids[stay], pair[stay]
            at = np.cumsum(size) - size + offset                            # only the pairs on both sides of a merge are new
            near = np.append(at[offset > 0] - 1, at[offset < size - 1])
            pair[at] = NONE                                                 # where it is now the last of its word
            pair[near] = self._makes(ids[near], ids[near + 1])
        owner, ids = map(np.concatenate, zip(*done))
        return ids[np.argsort(owner, kind="stable")], np.bincount(owner, minlength=len(words))

    def _encode(self, pieces):
        """Pieces of text -> an array of ids for each, in order.

        The cache is (words, start, ids): word i has ids[start[i]:start[i + 1]]. It is put back when a batch is in it whole, so
        an interrupt loses it, and nothing that is encoded between two ids of an unfinished text spoils them.
        """
        for batch in groups(map(nfc, pieces) if self.normalizer else pieces, 32 * CHUNK):
            narrow = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
            words, start, ids = self._cache or (Words(), np.zeros(1, np.int64), np.zeros(0, narrow))
            self._cache, known, chunks = None, len(words), []
            for group in groups(batch, CHUNK):
                *found, ends = split(group, self.pattern)
                chunks.append((words.number(*found), ends))
            if new := list(itertools.islice(reversed(words), len(words) - known))[::-1]:    # words[known:], but no walk there
                more, sizes = self._merge(new)
                start, ids = np.append(start, start[-1] + np.cumsum(sizes)), np.append(ids, more.astype(narrow))
            if len(words) <= CACHE and len(ids) <= 8 * CACHE: self._cache = words, start, ids
            for numbers, ends in chunks:
                first, size = start[numbers], start[numbers + 1] - start[numbers]
                end = np.cumsum(size)
                found = ids[np.repeat(first - (end - size), size) + np.arange(size.sum())]
                yield from np.split(found, np.append(0, end)[ends[:-1]])

    def _parts(self, text, special):
        """[ordinary, special token, ordinary, ...] as bytes."""
        tokens, text = sorted(map(as_bytes, special), key=len, reverse=True), as_bytes(text)
        return re.split(b"(" + b"|".join(map(re.escape, tokens)) + b")", text) if any(t in text for t in tokens) else [text]

    def encode(self, text, allowed_special=()):
        """str or bytes -> list of ids. Special tokens named in allowed_special ("all" for all) get their id; the rest, by
        default all, is ordinary text."""
        allowed = self.special_tokens if allowed_special == "all" else allowed_special
        if isinstance(allowed, str): raise ValueError(f"allowed_special={allowed!r}: want \"all\" or a list of special tokens")
        if unknown := [name for name in allowed if name not in self.special_tokens]:
            raise ValueError(f"allowed_special has {unknown[0]!r}, none of the special tokens {list(self.special_tokens)}")
        parts = self._parts(text, allowed)
        parts[::2] = [ids.tolist() for ids in self.encode_batch(parts[::2])]
        parts[1::2] = [[self.special_tokens[name.decode()]] for name in parts[1::2]]
        return list(itertools.chain(*parts))

    def encode_batch(self, texts):
        """Any iterable of str or bytes -> list of arrays of ids, uint16 where the vocabulary fits, else uint32. No special
        tokens."""
        sizes = []
        def pieces():
            for text in texts:
                sizes.append(0)
                for piece in cut([text]):
                    sizes[-1] += 1
                    yield piece
        arrays = iter(list(self._encode(pieces())))
        return [next(arrays) if n == 1 else np.concatenate(list(itertools.islice(arrays, n))) for n in sizes]

    def encode_iterable(self, lines):
        """Parts of one text (str or bytes; an open file, say) -> its ids one by one, as of the whole text, in bounded memory."""
        for ids in self._encode(cut(lines)): yield from ids.tolist()

    def decode_bytes(self, ids):
        """ids (any iterable of int) -> bytes. Raises ValueError for an id that is no token."""
        try: return b"".join([self.vocab[i] for i in (ids.tolist() if hasattr(ids, "tolist") else ids)])
        except KeyError as e: raise ValueError(f"token id {e.args[0]} is not in the vocabulary of {self.vocab_size}") from None

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_stream(self, ids):
        """Yields text as ids arrive, holding back the bytes of a character until it is whole."""
        return codecs.iterdecode((self.decode_bytes([int(i)]) for i in ids), "utf-8", "replace")

    # Files. The file's own form is JSON of to_dict(); a checkpoint may carry the dict itself.

    @functools.cached_property
    def hash(self):
        what = [self.pattern, self.special_tokens, self.normalizer, sorted((i, token.hex()) for token, i in self._tokens.items())]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def to_dict(self):
        merges, tokens = (self.merges, None) if self._own else ([], {letters(token): i for token, i in self._tokens.items()})
        return {"pattern": self.pattern, "special_tokens": dict(self.special_tokens), "normalizer": self.normalizer,
                "merges": list(map(list, merges)), "tokens": tokens, "hash": self.hash}

    @classmethod
    def from_dict(cls, d):
        try:
            tokens = d["tokens"] and {to_bytes(t): i for t, i in d["tokens"].items()}
            tok = cls(d["merges"], d["pattern"], dict(d["special_tokens"]), tokens, d["normalizer"])
        except (LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"not a tokenizer of bpe.py: {type(e).__name__} {e}") from None
        if tok.hash != d["hash"]:
            raise ValueError(f"damaged tokenizer: its hash is {tok.hash[:12]}, it says {str(d['hash'])[:12]}")
        return tok

    def save(self, path): write_json(path, self.to_dict())

    @classmethod
    def load(cls, path):
        """A file of `save` or a Hugging Face tokenizer.json. Raises ValueError if it is neither, or was damaged."""
        theirs = read(path, lambda text: "model" in json.loads(text))
        return cls.from_hf(path) if theirs else read(path, lambda text: cls.from_dict(json.loads(text)))

    def to_tiktoken(self):
        """-> tiktoken.Encoding with the same vocabulary, pattern and special tokens."""
        if self.normalizer: raise ValueError("tiktoken does not normalize to NFC: this tokenizer cannot become one of its")
        return self._engine

    @classmethod
    def from_tiktoken(cls, source, pattern=GPT2_SPLIT, special_tokens=()):
        """A tiktoken.Encoding, with its own pattern and special tokens, or the path of a rank file (base64 and rank per line)."""
        if hasattr(source, "_mergeable_ranks"): return cls([], source._pat_str, source._special_tokens, source._mergeable_ranks)
        return read(source, lambda text: cls([], pattern, special_tokens, {
            base64.b64decode(token, validate=True): int(rank)
            for token, rank in map(str.split, filter(str.strip, text.splitlines()))}))

    @classmethod
    def gpt2(cls):
        """GPT-2's vocabulary, as tiktoken downloads it or remembers it. Raises ValueError if it can do neither."""
        import tiktoken
        try: return cls.from_tiktoken(tiktoken.get_encoding("gpt2"))
        except OSError as e:    # what requests raises is an OSError
            raise ValueError(f"cannot get GPT-2's vocabulary ({type(e).__name__}): connect once, or read its published files "
                             "with Tokenizer.from_gpt2('merges.txt', 'vocab.json'), or train your own") from None

    @classmethod
    def from_merges(cls, vocab, merges, whole=False, pattern=GPT2_SPLIT, special_tokens=(), normalizer=None):
        """vocab: dict token -> id; merges: pairs of tokens, in order; tokens written in LETTERS, as the files do. tiktoken's
        engine needs only the tokens. It does the same if the file has one merge for each, in the order of ids, as training
        leaves them (only number and order are checked); or if it has all that there could be and (whole) takes a word that is a
        token whole."""
        try:
            tokens, merges = {to_bytes(t): i for t, i in vocab.items()}, [(to_bytes(a), to_bytes(b)) for a, b in merges]
            makes, pairs = [tokens[a + b] for a, b in merges], {(tokens[a], tokens[b]) for a, b in merges}
        except KeyError as e:
            raise ValueError(f"token {e.args[0]!r} is missing: not byte-level BPE, or a damaged file") from None
        tok = cls([], pattern, special_tokens, tokens, normalizer)
        trained = len({*makes}) == len(makes) == len(tokens) - 256
        if makes != sorted(makes) or not (trained or whole and pairs == {*tok.merges}):
            raise ValueError("its merges are not those of its ids, in their order: this cannot be read")
        return tok

    @classmethod
    def from_gpt2(cls, merges_path, vocab_path=None):
        """GPT-2's published merges.txt (vocab.bpe) and vocab.json (encoder.json); without the latter, numbered as GPT-2 does."""
        def parse(text):
            merges = [line.split(" ") for line in text.split("\n") if line and not line.startswith("#version")]
            tokens = [*LETTERS.values(), *(a + b for a, b in merges), ENDOFTEXT]
            vocab = read(vocab_path, json.loads) if vocab_path else dict(zip(tokens, range(len(tokens))))
            special = {ENDOFTEXT: vocab.pop(ENDOFTEXT)} if ENDOFTEXT in vocab else {}
            return cls.from_merges(vocab, merges, special_tokens=special)
        return read(merges_path, parse)

    def to_hf(self, path):
        """Write a Hugging Face tokenizer.json."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.pattern == GPT2_SPLIT}
        pattern = CL100K_HF if self.pattern == CL100K_SPLIT else self.pattern
        regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        names = {letters(token): i for token, i in self._tokens.items()}
        if clash := [t for t in self.special_tokens if t in names]:
            raise ValueError(f"Hugging Face's file cannot hold the special token {clash[0]!r}: an ordinary token is written so")
        write_json(path, {
            "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": level,
            "added_tokens": [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                             for t, i in self.special_tokens.items()],
            "normalizer": {"type": self.normalizer} if self.normalizer else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [level] if level["use_regex"] else [regex, level]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": not self._own,
                      "vocab": names | self.special_tokens,     # also here, or their ids would follow the last of the others
                      "merges": [[letters(self.vocab[a]), letters(self.vocab[b])] for a, b in self.merges]}})

    @classmethod
    def from_hf(cls, path):
        """Read a Hugging Face tokenizer.json: byte-level BPE with a pattern that __init__ takes (GPT-2, Llama 3, Qwen, ...).
        Added tokens become special tokens; what a post-processor adds, such as a first token, is the caller's to add."""
        def parse(text):
            d = json.loads(text)
            model, norm = d["model"], (d.get("normalizer") or {}).get("type")
            steps = d.get("pre_tokenizer") or {"type": "missing"}
            steps = steps.get("pretokenizers", [steps])
            cuts = [s["pattern"].get("Regex") for s in steps
                    if s["type"] == "Split" and s["behavior"] == "Isolated" and not s["invert"]]
            cuts += [GPT2_SPLIT for s in steps if s["type"] == "ByteLevel" and s.get("use_regex", True)]
            wrong = [f"its {what} is {x!r}" for what, x, *ok in [
                ("model", model.get("type", "BPE"), "BPE"), ("number of split patterns", len(cuts), 1),
                ("byte_fallback (SentencePiece's)", model.get("byte_fallback", False), False), ("normalizer", norm, None, "NFC"),
                *[("pre-tokenizer", s["type"], "Split", "ByteLevel") for s in steps],
                *[("prefix space", s.get("add_prefix_space", False), False) for s in steps],
                *[(key, model.get(key) or None, None) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")],
                *[(f"added token {t['content']!r}", key, None) for t in d.get("added_tokens", [])
                  for key in ("lstrip", "rstrip", "single_word") if t.get(key)],
                ("last pre-tokenizer", steps[-1]["type"], "ByteLevel")] if x not in ok]
            if wrong:
                raise ValueError(f"{', '.join(wrong)}: can read only byte-level BPE, one split pattern, NFC or no normalizer")
            special = {t["content"]: t["id"] for t in d.get("added_tokens", [])}
            vocab = {t: i for t, i in model["vocab"].items() if t not in special}
            merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            return cls.from_merges(vocab, merges, model.get("ignore_merges"), cuts[0], special, norm)
        return read(path, parse)

SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]    # LETTERS: what GPT-2's files write for each byte, in its order
LETTERS = {b: chr(b) for b in SHOWN} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in SHOWN)}
BYTES = {letter: b for b, letter in LETTERS.items()}

def letters(token): return "".join(map(LETTERS.get, token))
def to_bytes(name): return bytes(map(BYTES.__getitem__, name))

def read(path, parse):
    """parse(the text of the file); what is wrong with it becomes a ValueError that names the file."""
    try:
        with open(path, encoding="utf-8") as f: return parse(f.read())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"cannot read {path}: {e if isinstance(e, ValueError) else f'{type(e).__name__} {e}'}") from None

def write(path, save):
    """Whole or not at all: save(file) fills a temporary file, which becomes `path` once it is safely on the disk."""
    f = open(f"{path}.{os.getpid()}", "wb")
    try:
        with f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, path)
    finally:
        if os.path.exists(f.name): os.remove(f.name)    # a full disk must not stay full

def write_json(path, d):
    write(path, lambda f: f.write(json.dumps(d, separators=(",", ":"), ensure_ascii=False).encode()))

# ---- Command line -------------------------------------------------------------------------------------------------------------

def progress(label, total=0, unit=1):
    """-> add(n), which shows on stderr how far, how long still, how fast: in place on a terminal, else a line every 10
    seconds."""
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

def main(argv=None):
    import argparse
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on files, each one document.")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--vocab_size", type=int, default=4096, help="number of ids, bytes and special tokens included")
    parser.add_argument("--out", default="tok.json", help="file to write")
    parser.add_argument("--pattern", default="gpt2", choices=["gpt2", "gpt4"], help="how text is split into words")
    parser.add_argument("--special", default=ENDOFTEXT, help="special tokens, separated by commas")
    parser.add_argument("--workers", type=int, help="processes that count words (default: one per core)")
    a = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="backslashreplace")    # names no terminal can show
    try:
        began, total = time.time(), sum(map(os.path.getsize, a.files))
        if not total: raise ValueError(f"{', '.join(a.files)}: no text")
        if os.path.isdir(a.out or ".") or not os.path.isdir(os.path.dirname(a.out) or "."):
            raise ValueError(f"--out={a.out} must be a file in a folder that exists")
        def parts(path):
            with open(path, "rb") as f: yield from iter(functools.partial(f.read, CHUNK), b"")
        docs = map(parts, a.files)
        pattern, special = GPT2_SPLIT if a.pattern == "gpt2" else GPT4_SPLIT, [s for s in a.special.split(",") if s]
        tok = Tokenizer.train(docs, a.vocab_size, pattern, special, a.workers, verbose=True, n_bytes=total)
        tok.save(a.out)
        with open(a.files[0], "rb") as f: sample = f.read(1 << 20)
        ratio, seconds = len(sample) / max(1, len(tok.encode_batch([sample])[0])), time.time() - began
        print(f"{a.out}: {len(tok.merges):,} merges, vocab_size {tok.vocab_size:,}; {total / 1e6:.1f} MB in {seconds:.2f} s; "
              f"{ratio:.2f} bytes per token")
    except (ValueError, OSError) as e: sys.exit(f"error: {e}")
    except KeyboardInterrupt: sys.exit("error: interrupted, nothing written")

if __name__ == "__main__": main()
