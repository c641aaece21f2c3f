#pragma once

// Where the cache lies: with the layers, on devices that have kernels for it, or in the host's memory.

#include "monarch-knobs.h"
#include "monarch-op.h"

#include "llama-memory.h"

#include "ggml-backend.h"

struct llama_cparams;
struct llama_model;

enum monarch_place {
    MONARCH_PLACE_HOST,   // in the host's memory, attended by the CPU
    MONARCH_PLACE_DEVICE, // where the layers are
    MONARCH_PLACE_MAPPED, // there, but for the blocks of cold pages: those are in the host's memory, where devices reach them
};

// throws std::runtime_error if the devices of the model's layers cannot do what the knobs ask for
monarch_place monarch_place_find(
        const llama_model         & model,
        const llama_memory_params & params,
        const llama_cparams       & cparams,
        const monarch_knobs       & knobs,
        const monarch_op_params   & op);

// memory for a layer's summaries, sticky state and frames
ggml_backend_buffer_type_t monarch_place_get_buft(monarch_place place, ggml_backend_dev_t dev);

// memory for its blocks; null: none that the device reaches
ggml_backend_buffer_type_t monarch_place_get_pool_buft(monarch_place place, ggml_backend_dev_t dev);
