# The offline default: trains on the source code of your own Python's standard library. Needs no download and no GPU.
dataset = "stdlib"
vocab_size = 4096
n_layer, n_head, n_embd, block_size = 3, 4, 256, 256
batch_size, max_iters = 8, 350
eval_interval = 350                     # once, at the end, on the whole validation split
start = "def main"                      # of the sample at the end
unembedding_lr = 0.012                  # the default is for wider models
beta1, beta2 = 0.5, 0.99                # a short run: little momentum; small batches are noisy: a long average of squares
window_pattern, window = "S", 8         # all layers but the last see eight tokens: learns faster, above all in short runs
