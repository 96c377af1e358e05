"""
Every knob of every stage, with its type, default and meaning, and the loader that fills them in.

    defaults  <  config files, in order  <  --key=value
    python train.py config/shakespeare.py --max_iters=100 --no_compile

A config file is plain Python assignments (see the files beside this one). Any script takes any config file. A new knob is one
line below, with its default and its comment: an int or float, which cannot be negative, a str, a bool or a Literal.
`python train.py --help` prints every knob below. Defaults are set here and nowhere else (except bpe.py's own command line).
"""
import contextlib, dataclasses, difflib, math, os, re, runpy, sys, textwrap, types, typing
from typing import Literal

@dataclasses.dataclass
class GPTConfig:
    """The model's shape and nothing else; saved in every checkpoint. The defaults are a modern 124M-class GPT."""
    block_size: int = 1024          # longest context, in tokens
    vocab_size: int = 50304         # rows of the embedding; for tokenizer="bpe" also the size of the vocabulary to train
    n_layer: int = 12               # transformer blocks
    n_head: int = 12                # query heads
    n_kv_head: int = 0              # key/value heads: 0 = n_head (MHA), 1 = MQA, between = GQA; must divide n_head
    n_embd: int = 768               # width of the residual stream
    head_size: int = 0              # width of each head: 0 = n_embd/n_head
    n_inner: int = 0                # hidden width of the MLP: 0 = 4*n_embd, or for swiglu the multiple of 64 nearest 8/3*n_embd
    pos: Literal["rope", "learned", "sinusoidal"] = "rope"          # position encoding
    rope_theta: float = 10000.0     # base of rope and sinusoidal: dimension pair d turns by position / rope_theta^(2d/D)
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"   # stretch RoPE to a longer context
    rope_factor: float = 1.0        # by how much: block_size divided by the context length the model was first trained with
    rope_trained: int = 0           # that first length, in tokens; 0 = block_size/rope_factor
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"               # RMSNorm has a learned gain only with norm_gain
    norm_gain: bool = False         # RMSNorm and QK-norm multiply by a learned gain, as in Llama and Qwen3
    norm_eps: float = 1e-5          # added to the variance or mean square in every norm
    mlp: Literal["relu2", "swiglu", "gelu"] = "relu2"               # activation of the MLP
    bias: bool = False              # biases in linear layers and LayerNorm, as in GPT-2
    qk_norm: bool = True            # normalise queries and keys per head before the dot product
    window_pattern: str = ""        # "" = full attention; "SSSL" repeats: S = last `window` tokens, L (and the last layer) = all
    window: int = 0                 # how many tokens an S layer sees, the current one included
    logit_softcap: float = 0.0      # squash logits into (-cap, cap) with cap*tanh(x/cap); 0 = off
    tie_weights: bool = False       # share the embedding with the output head
    zero_init: bool = True          # output projections and untied head start at zero; False = GPT-2's scaled normal
    dropout: float = 0.0            # dropout probability in attention, MLP and embedding

    def __post_init__(self):
        vars(self).update({name: coerce(name, value) for name, value in vars(self).items()})
        for name, value in vars(self).items():
            require(type(value) not in (int, float) or value >= 0, f"{name}={value} must not be negative")
            for what, (holds, knobs) in RANGES.items():
                require(name not in knobs.split() or holds(value), f"{name}={value} must be {what}")
        require(self.head_size or self.n_embd % self.n_head == 0,
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one, or set head_size")
        require(self.n_head % self.kv_heads == 0, f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        require(self.pos != "rope" or self.head_dim % 2 == 0,
                f"pos='rope': the width of a head must be even, not {self.head_dim}: change n_embd, n_head or head_size")
        require(self.pos != "sinusoidal" or self.n_embd % 2 == 0, f"pos='sinusoidal' needs an even n_embd, not {self.n_embd}")
        require(not (self.tie_weights and self.zero_init),
                "tie_weights shares the embedding with the head, which zero_init sets to zero: add --no_zero_init")
        require((self.rope_scaling != "none") == (self.rope_factor > 1) and (self.pos == "rope" or self.rope_factor == 1),
                f"rope_scaling={self.rope_scaling!r}, rope_factor={self.rope_factor}, pos={self.pos!r}: "
                "a scaling and a factor above 1 belong together, and both need pos='rope'")
        require(set(self.window_pattern) <= set("SL") and ("S" in self.window_pattern) == (self.window > 0),
                f"window_pattern={self.window_pattern!r} and window={self.window} belong together: the pattern may hold S and L, "
                "and it needs an S if window is above 0, as in 'SSSL' and 128, or none if window is 0")
        require(not self.norm_gain or self.norm == "rmsnorm", "norm_gain is for norm='rmsnorm': layernorm always has a gain")

    head_dim = property(lambda self: self.head_size or self.n_embd // self.n_head)
    kv_heads = property(lambda self: self.n_kv_head or self.n_head)
    trained_length = property(lambda self: self.rope_trained or self.block_size / self.rope_factor)
    swiglu_inner = property(lambda self: 64 * max(round(self.n_embd * 8 / 3 / 64), 1))
    inner = property(lambda self: self.n_inner or (self.swiglu_inner if self.mlp == "swiglu" else 4 * self.n_embd))

    @property
    def windows(self):
        """Tokens that each layer sees, 0 = all: window_pattern="SL", window=64, n_layer=5 -> [64, 0, 64, 0, 0]"""
        letters = (self.window_pattern or "L") * self.n_layer
        return [self.window if letter == "S" else 0 for letter in letters[:self.n_layer - 1]] + [0]

@dataclasses.dataclass
class Config(GPTConfig):
    """GPTConfig plus the knobs of data, tokenizer, training and sampling. `cfg.model()` is the GPTConfig alone."""
    # data (prepare.py)
    dataset: str = "stdlib"         # stdlib, shakespeare, tinystories, fineweb (stdlib_x: same text, own folder), or your --input
    input: str = ""                 # your own files or folders (.txt .md .py .jsonl), comma separated; bench.py eval: files
    tokenizer: str = "bpe"          # bpe = train one on the training split; gpt2; or the path of a tokenizer.json
    split_pattern: Literal["gpt2", "gpt4"] = "gpt2"                 # how bpe cuts text into words before merging
    val_fraction: float = 0.1       # share of documents (of one text: its end) for validation, if the data has no split
    num_shards: int = 103           # fineweb: training shards of 100M tokens to fetch; 103 is all of FineWeb-10B
    workers: int = 0                # processes that read, count and encode; 0 = one per core
    # run (train.py)
    out_dir: str = ""               # the run's folder; "": train.py out/<dataset>, sample.py the newest; sample.py: or a .pt file
    init_from: str = "scratch"      # scratch; resume = from out_dir/ckpt.pt; gpt2, -medium, -large, -xl; a Hugging Face folder
    max_iters: int = 1000           # optimizer steps
    batch_size: int = 16            # sequences per forward pass on one device
    tokens_per_step: int = 0        # tokens per optimizer step over all devices; 0 = batch_size*block_size (only with one device)
    eval_interval: int = 250        # steps between evaluations and checkpoints
    eval_tokens: int = 0            # validation tokens per evaluation, spread over the split, the same every time; 0 = all
    log_interval: int = 10          # steps between log lines
    doc_mask: bool = False          # in training and validation, a token sees nothing before its own document (chats: exchange)
    sample_interval: int = 0        # steps between samples from best.pt during training, after an evaluation; 0 = only at the end
    keep_checkpoints: int = 0       # besides ckpt.pt and best.pt, keep ckpt_<step>.pt for this many of the latest evaluations
    wandb_log: bool = False         # also log to Weights & Biases
    wandb_project: str = "gpt"      # the project there; the run is named after out_dir
    profile: int = 0                # trace this many steps, after three warm-up steps, to out_dir/trace.json (chrome://tracing)
    seed: int = 1337                # for initialisation, batches and sampling
    # fine-tuning (train.py)
    objective: Literal["tokens", "dpo"] = "tokens"  # tokens: predict the next one; dpo: prefer the chosen answer of each pair
    dpo_beta: float = 0.1           # dpo: penalty for moving away from the starting model; smaller = may move further
    lora_rank: int = 0              # freeze the model and learn low-rank additions to its attention; 0 = train every weight
    # optimizer (model.py, train.py)
    optimizer: Literal["muon", "adamw"] = "muon"    # muon: Muon for hidden matrices, AdamW for the rest (with LoRA: for all)
    learning_rate: float = 6e-4     # AdamW's rate; with Muon only for gains and biases, by default none: then set the next three
    matrix_lr: float = 0.01         # Muon's rate: about how far a step moves a hidden matrix in each of its singular directions
    embedding_lr: float = 0.05      # with Muon: AdamW's rate for the embedding, unless tied
    unembedding_lr: float = 0.004   # with Muon: AdamW's rate for the head (also if tied) and for learned positions
    weight_decay: float = 0.0       # decoupled, on the blocks' matrices; without Muon also on the embedding and the head
    beta1: float = 0.8              # AdamW's momentum (Muon's is 0.95, in model.py)
    beta2: float = 0.95             # AdamW's second moment
    grad_clip: float = 1.0          # clip the gradient to this norm; 0 = no clipping
    max_bad_steps: int = 10         # stop after this many steps in a row with a non-finite gradient; such steps are skipped
    warmup_iters: int = 0           # steps of linear warm-up
    lr_schedule: Literal["linear", "cosine"] = "linear"             # shape of the decay
    decay_frac: float = 1.0         # fraction of max_iters, at the end, that decays; 1 = decay starts right after the warm-up
    min_lr_frac: float = 0.05       # final learning rate, as a fraction of the peak
    # machine
    device: str = "auto"            # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # of the forward pass; weights stay float32 in training
    grad_checkpoint: bool = False   # save memory: keep only each block's input and recompute the rest in the backward pass
    shard_optimizer: bool = False   # torchrun: each rank keeps a part of the optimizer state (ZeRO 1, arXiv:1910.02054)
    compile: Literal[True, False, None] = None      # torch.compile (not for beams); unset = only for training on CUDA
    # evaluation (bench.py eval)
    task: str = ""                  # multiple choice: hellaswag, arc_easy, arc_challenge, mmlu or .jsonl files, comma separated
    stride: int = 0                 # tokens scored per window of a text; 0 = block_size/2: each sees at least half a context
    # sampling (sample.py; train.py's own samples use start, and defaults for the rest)
    start: str = ""                 # prompt (special tokens allowed; \n is no newline), or FILE:path; "": end-of-text or line end
    prompts: str = ""               # instead of start: a file, one prompt per line (.jsonl: {"prompt": ..}); prints JSON lines
    num_samples: int = 1            # continuations to draw per prompt
    max_new_tokens: int = 256       # length of each continuation, in tokens
    temperature: float = 0.8        # 0 = argmax; below 1 = safer, above 1 = wilder
    top_k: int = 200                # keep the k most likely tokens; 0 = all
    top_p: float = 1.0              # keep the most likely tokens whose probabilities add up to p; 1 = all
    min_p: float = 0.0              # keep tokens at least this fraction as likely as the most likely one; 0 = all
    repetition_penalty: float = 1.0 # above 1 = tokens already in the text become less likely; 1 = off
    stop: str = ""                  # end a sample at this text or special token; separate several by |; \n is a newline
    num_beams: int = 1              # above 1: beam search of this width; needs temperature=0
    best_of: int = 1                # above num_samples: draw this many and keep the num_samples most likely
    length_penalty: float = 1.0     # beams and best_of rank by log-probability / tokens ** length_penalty
    logprobs: bool = False          # print each token's log-probability in nats, from the unfiltered model (beams: with penalty)
    past_context: Literal["window", "error"] = "window"     # a full context: forget its oldest tokens, or refuse before starting
    sinks: int = 4                  # window: never forget this many first tokens, at most half a context (attention sinks)
    quantize: Literal["none", "int8"] = "none"              # int8: matrices as 8-bit integers with a scale per row
    speculate: int = 0              # draft this many tokens from earlier text, then check them in one pass; 0 = off
    prefill_chunk: int = 512        # prompt tokens per forward pass
    interactive: bool = False       # a conversation: each line you type continues the text
    export: str = ""                # instead of sampling, write the model to this folder, for transformers to load
    visualize: str = ""             # write this HTML page: probabilities, alternatives and attention of the first sample

    def __post_init__(self):
        super().__post_init__()
        home = lambda paths: re.sub(r"(^|,\s*)~(?=[/,]|$)", lambda m: m[1] + os.path.expanduser("~"), paths)
        for key in "input out_dir tokenizer init_from prompts task export visualize".split():       # shells keep a ~ after a =
            setattr(self, key, home(getattr(self, key)))
        require(not self.lora_rank or self.init_from != "scratch", "lora_rank adapts a trained model: name it with --init_from")
        require(self.objective != "dpo" or self.batch_size % 2 == 0, f"dpo has pairs: batch_size={self.batch_size} must be even")
        no_draws = self.temperature == 0 and self.num_samples <= self.num_beams and self.best_of == 1 and not self.speculate
        require(self.num_beams == 1 or no_draws,
                "num_beams is a search without draws: it needs temperature=0, best_of=1, speculate=0, num_samples <= num_beams")

    def model(self):
        return GPTConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GPTConfig)})

RANGES = {      # a number must not be negative, and:
    "at least 1": (lambda x: x >= 1, "block_size vocab_size n_layer n_head n_embd rope_factor max_iters batch_size max_bad_steps "
                   "eval_interval log_interval num_samples max_new_tokens num_beams best_of num_shards prefill_chunk"),
    "above 0": (lambda x: x > 0, "rope_theta norm_eps repetition_penalty dpo_beta"),
    "0 or at least 1e-6": (lambda x: x == 0 or x >= 1e-6, "temperature"),
    "in [0, 1]": (lambda x: x <= 1, "min_lr_frac min_p decay_frac"),
    "in (0, 1]": (lambda x: 0 < x <= 1, "top_p"),
    "below 1": (lambda x: x < 1, "dropout beta1 beta2"),
    "in (0, 1)": (lambda x: 0 < x < 1, "val_fraction"),
    "below 2**32": (lambda x: x < 2 ** 32, "seed")}             # train.py packs it and the step into 64 bits
KINDS = typing.get_type_hints(Config)
# its name in nanoGPT and elsewhere -> ours
OTHERS = dict(gradient_accumulation_steps="tokens_per_step", eval_iters="eval_tokens", min_lr="min_lr_frac",
              decay_lr="decay_frac", lr_decay_iters="decay_frac", wandb_run_name="out_dir", eval_only="bench.py eval",
              always_save_checkpoint="keep_checkpoints", backend="device",
              epochs="max_iters", max_steps="max_iters", num_iterations="max_iters", lr="learning_rate",
              context_length="block_size", prompt="start", max_length="max_new_tokens", resume="init_from")

def require(ok, message):
    if not ok: raise ValueError(message)

def coerce(key, value, word=False):
    """`value`, checked, as knob `key`'s type; a `word` is parsed first: coerce("max_iters", "1e3", word=True) -> 1000"""
    kind = KINDS[key]
    choices, limit = (True, False) if kind is bool else typing.get_args(kind), math.inf if kind is float else 2 ** 63
    if word and choices: value = {str(choice).lower(): choice for choice in choices}.get(value.lower(), value)
    elif word and kind is not str:
        with contextlib.suppress(ValueError): value = float(value)
    if choices: fits = any(value == choice and type(value) is type(choice) for choice in choices)       # 1 is not True here
    elif kind is str: fits = type(value) is str
    else: fits = type(value) in (int, float) and abs(value) < limit and kind(value) == value        # nan and inf do not fit
    require(fits, f"{key} wants {' or '.join(map(repr, choices)) or kind.__name__}, not {value!r}")
    return value if choices else kind(value)

def read(path):
    """{knob: value} of a config file."""
    require(path.endswith(".py"), f"{path!r} is neither a config file (.py) nor a knob: write --key=value, with the =")
    require(os.path.isfile(path), f"no config file {path!r}")
    try: scope = runpy.run_path(path)
    except Exception as e: raise ValueError(f"{path}: not a config file of plain assignments: {type(e).__name__}: {e}") from None
    return {key: value for key, value in scope.items() if not key.startswith("_") and not isinstance(value, types.ModuleType)}

def load(argv):
    """Config from command-line words: config files, --key=value, --key, --no_key. Raises ValueError for anything wrong."""
    if {"--help", "-h"} & set(argv): sys.exit(print(usage()))       # print returns None: exit code 0
    files, flags = {}, {}
    for word in sorted(argv, key=lambda word: not word.startswith("--")):   # if a flag is wrong, no file is run
        name, equals, text = word.partition("=") if word.startswith("--") else (word, "", "")
        if not word.startswith("--"): given = read(word)
        elif equals: given = {name[2:]: text}
        elif name.startswith("--no_") and name[5:] in KINDS: given = {name[5:]: False}
        else: given = {name[2:]: True}
        for key, value in given.items():
            near = [OTHERS[key]] if key in OTHERS else difflib.get_close_matches(key, KINDS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            require(key in KINDS, f"{name}: unknown knob {key!r}{hint} (--help lists all)")
            try: (flags if word.startswith("--") else files)[key] = coerce(key, value, word=bool(equals))
            except ValueError as e:
                raise ValueError(f"{name}: {e}" + ": write --key=value, with the =" * (word == "--" + key)) from None
    return Config(**files | flags)

def usage():
    """Every knob with its default and comment, read from the two classes above."""
    with open(__file__, encoding="utf-8") as f: source = f.read()
    lines = [f"{__doc__.strip()}\n\n# model (model.py)"]
    knob = r"^    (?:(# .*)|(\w+): ((?:int|float|str|bool|Literal).*?) = (.+?) +# (.+))$"
    for heading, key, kind, default, comment in re.findall(knob, source, re.M):
        lines.append(heading or f"  --{key:<20}{kind.removeprefix('Literal'):<12} {comment} (default {default})")
    return "\n".join(lines)

def show(cfg):
    """The resolved config on a few lines, for the start of a run."""
    words = (f"{key}={value!r}" for key, value in vars(cfg).items())
    return textwrap.fill("  ".join(words), 118, break_long_words=False, break_on_hyphens=False)

def run(main, parse=load):
    """What every script's `if __name__ == "__main__"` calls: main(load(argv)); a user error becomes one line and exit code 1."""
    if hasattr(sys.stdout, "reconfigure"): sys.stdout.reconfigure(errors="backslashreplace")    # for file names it cannot encode
    sys.stderr = sys.stderr or open(os.devnull, "w")        # it is None when closed by 2>&-
    try: main(parse(sys.argv[1:]))
    except BrokenPipeError: os._exit(1)         # such as by `| head`
    except (ValueError, OSError) as e: sys.exit(f"error: {e}")
    except MemoryError: sys.exit("error: out of memory")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
