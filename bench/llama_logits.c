/* Writes llama.cpp's logits of every position of a text, for quality.py: the counterpart of our example `logits`.
 *
 * usage: llama_logits MODEL.gguf IDS WINDOW THREADS f32|f16 >LOGITS
 *
 * IDS holds token ids, int32. Every window of them is a prompt of its own, computed in one batch. The last argument is
 * the type of the KV cache. LOGITS becomes [num_tokens, vocab], f32. Links with libllama and libggml of one build. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llama.h"

static void fail(const char * what) {
    fprintf(stderr, "llama_logits: %s\n", what);
    exit(1);
}

static void warnings_only(enum ggml_log_level level, const char * text, void * unused) {
    (void) unused;
    if (level >= GGML_LOG_LEVEL_WARN && level <= GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

/* Decodes one prompt and writes the logits of all of its positions. */
static void decode(struct llama_context * context, const llama_token * tokens, int count, size_t vocab) {
    struct llama_batch batch = llama_batch_init(count, 0, 1);
    batch.n_tokens = count;
    for (int i = 0; i < count; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    llama_memory_clear(llama_get_memory(context), true);
    if (llama_decode(context, batch) != 0) {
        fail("llama_decode refused the batch");
    }
    for (int i = 0; i < count; i++) {
        if (fwrite(llama_get_logits_ith(context, i), sizeof(float), vocab, stdout) != vocab) {
            fail("cannot write");
        }
    }
    llama_batch_free(batch);
}

int main(int argc, char ** argv) {
    if (argc != 6) {
        fail("usage: llama_logits MODEL.gguf IDS WINDOW THREADS f32|f16");
    }
    const int window = atoi(argv[3]), threads = atoi(argv[4]);
    llama_log_set(warnings_only, NULL);
    llama_backend_init();
    struct llama_model_params load = llama_model_default_params();
    /* No repacked weights: their AMX kernel crashed on models/smol in Q8_0 (llama-cpp-python 0.3.36's llama.cpp). */
    load.use_extra_bufts = false;
    struct llama_model * model = llama_model_load_from_file(argv[1], load);
    if (model == NULL || window < 1) {
        fail("cannot load the model");
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = (uint32_t) window;
    params.n_threads = params.n_threads_batch = threads;
    params.type_k = params.type_v = strcmp(argv[5], "f32") == 0 ? GGML_TYPE_F32 : GGML_TYPE_F16;
    struct llama_context * context = llama_init_from_model(model, params);
    FILE * ids = fopen(argv[2], "rb");
    llama_token * tokens = malloc((size_t) window * sizeof *tokens);
    if (context == NULL || ids == NULL || tokens == NULL) {
        fail("cannot start");
    }
    const size_t vocab = (size_t) llama_vocab_n_tokens(llama_model_get_vocab(model));
    size_t count;
    while ((count = fread(tokens, sizeof *tokens, (size_t) window, ids)) > 0) {
        decode(context, tokens, (int) count, vocab);
    }
    free(tokens);
    fclose(ids);
    llama_free(context);
    llama_model_free(model);
    return fflush(stdout) == 0 ? 0 : 1;
}
