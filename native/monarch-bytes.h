#pragma once

// Bytes of a tensor as the host sees them: in place where they lie in host memory, else a copy from the device that holds
// them, which goes back when it ends if the host changes it. The device has done by then what it was asked to.

#include "ggml-backend.h"

#include <stdint.h>

#include <vector>

class monarch_bytes {
public:
    static monarch_bytes read  (ggml_tensor * tensor)                             { return { tensor, 0, ggml_nbytes(tensor), false }; }
    static monarch_bytes read  (ggml_tensor * tensor, size_t offset, size_t size) { return { tensor, offset, size, false }; }
    static monarch_bytes change(ggml_tensor * tensor)                             { return { tensor, 0, ggml_nbytes(tensor), true }; }
    static monarch_bytes change(ggml_tensor * tensor, size_t offset, size_t size) { return { tensor, offset, size, true }; }

    monarch_bytes(const monarch_bytes &) = delete;
    monarch_bytes & operator=(const monarch_bytes &) = delete;

    monarch_bytes(monarch_bytes &&) = default; // leaves no copy behind

    ~monarch_bytes() {
        if (is_changed && !copy.empty()) {
            ggml_backend_tensor_set(tensor, copy.data(), offset, copy.size());
        }
    }

    uint8_t * data() {
        return copy.empty() ? (uint8_t *) tensor->data + offset : copy.data();
    }

private:
    monarch_bytes(ggml_tensor * tensor, size_t offset, size_t size, bool is_changed) : tensor(tensor), offset(offset), is_changed(is_changed) {
        if (!ggml_backend_buffer_is_host(tensor->buffer)) {
            copy.resize(size);
            ggml_backend_tensor_get(tensor, copy.data(), offset, size);
        }
    }

    ggml_tensor        * tensor;
    size_t               offset;
    bool                 is_changed;
    std::vector<uint8_t> copy;
};
