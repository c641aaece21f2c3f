// A device that runs the paged cache's CUDA kernels in their emulation and everything else on the CPU. Tests register it
// with the library before they load a model; to the library, its memory is out of the host's reach.

#include "monarch-cuda.cuh"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include <vector>

// stock has no such op
#pragma weak ggml_monarch_get_store

static const size_t  ALIGNMENT = 256;
static const size_t  GUARD     = 4096;
static const int32_t N_SM      = 3;
static const size_t  N_BYTES   = (size_t) 1 << 40; // of memory

static size_t n_bytes_taken = 0;

//
// memory: of the device, and of the host where the device reaches it
//

static void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return buffer->context;
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    if (!ggml_backend_buffer_is_host(buffer)) {
        n_bytes_taken -= buffer->size;
    }
    free(buffer->context);
}

static void buffer_memset_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    memset((char *) tensor->data + offset, value, size);
}

static void buffer_set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    memcpy((char *) tensor->data + offset, data, size);
}

static void buffer_get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) tensor->data + offset, size);
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    memset(buffer->context, value, buffer->size);
}

static const char * device_buft_get_name(ggml_backend_buffer_type_t) {
    return "Emulated";
}

static const char * mapped_buft_get_name(ggml_backend_buffer_type_t) {
    return "Emulated_Mapped";
}

static size_t buft_get_alignment(ggml_backend_buffer_type_t) {
    return ALIGNMENT;
}

static bool mapped_buft_is_host(ggml_backend_buffer_type_t) {
    return true;
}

// NaN, whatever it is taken for
static ggml_backend_buffer_t buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_i iface = {};

    iface.free_buffer   = buffer_free;
    iface.get_base      = buffer_get_base;
    iface.memset_tensor = buffer_memset_tensor;
    iface.set_tensor    = buffer_set_tensor;
    iface.get_tensor    = buffer_get_tensor;
    iface.clear         = buffer_clear;

    void * data = nullptr;
    if (posix_memalign(&data, ALIGNMENT, size + ALIGNMENT) != 0) {
        return nullptr;
    }
    memset(data, 0xff, size);

    if (!ggml_backend_buft_is_host(buft)) {
        n_bytes_taken += size;
    }
    return ggml_backend_buffer_init(buft, iface, data, size);
}

static ggml_backend_reg    reg;
static ggml_backend_device device;

static ggml_backend_buffer_type device_buft;
static ggml_backend_buffer_type mapped_buft;

static bool is_own(ggml_backend_buffer_type_t buft) {
    return buft == &device_buft || buft == &mapped_buft;
}

//
// backend
//

static const char * backend_get_name(ggml_backend_t) {
    return "Emulated";
}

static void backend_free(ggml_backend_t backend) {
    ggml_backend_free((ggml_backend_t) backend->context);
    delete backend;
}

static void forward(ggml_tensor * dst) {
    cuda_emulation_order = 2; // shuffled

    if (monarch_cuda_get_params(dst).kind == MONARCH_OP_PAGE_OUT) {
        monarch_cuda_forward_page_out(dst, nullptr);
        return;
    }

    std::vector<uint8_t> work(monarch_cuda_attend_size(dst, N_SM) + GUARD, 0xff);
    monarch_cuda_forward_attend(dst, N_SM, work.data(), nullptr);

    for (size_t i = work.size() - GUARD; i < work.size(); ++i) {
        GGML_ASSERT(work[i] == 0xff);
    }
}

static ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    int32_t i = 0;
    while (i < graph->n_nodes) {
        if (graph->nodes[i]->op == GGML_OP_MONARCH) {
            forward(graph->nodes[i++]);
            continue;
        }

        int32_t end = i + 1;
        while (end < graph->n_nodes && graph->nodes[end]->op != GGML_OP_MONARCH) {
            ++end;
        }

        ggml_cgraph view = ggml_graph_view(graph, i, end);

        const ggml_status status = ggml_backend_graph_compute((ggml_backend_t) backend->context, &view);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        i = end;
    }
    return GGML_STATUS_SUCCESS;
}

//
// device
//

static const char * device_get_name(ggml_backend_dev_t) {
    return "Emulated";
}

static void device_get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free  = N_BYTES - n_bytes_taken;
    *total = N_BYTES;
}

static enum ggml_backend_dev_type device_get_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void device_get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name        = device_get_name(dev);
    props->description = device_get_name(dev);
    props->type        = device_get_type(dev);
    device_get_memory(dev, &props->memory_free, &props->memory_total);
}

static ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char *) {
    ggml_backend_i iface = {};

    iface.get_name      = backend_get_name;
    iface.free          = backend_free;
    iface.graph_compute = backend_graph_compute;

    ggml_backend_t cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(cpu, 1);

    static ggml_guid guid = { 'm', 'o', 'n', 'a', 'r', 'c', 'h' };

    return new ggml_backend { &guid, iface, dev, cpu };
}

static ggml_backend_buffer_type_t device_get_buffer_type(ggml_backend_dev_t) {
    return &device_buft;
}

static bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    if (op->op != GGML_OP_MONARCH) {
        return true; // the CPU has all that the tests' models need
    }
    const ggml_tensor     * store  = ggml_monarch_get_store(op);
    const monarch_op_params params = monarch_cuda_get_params(op);

    return store->buffer && is_own(store->buffer->buft) && monarch_codec_is_valid(&params.codec);
}

static bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
    return is_own(buft);
}

//
// registry
//

static const char * reg_get_name(ggml_backend_reg_t) {
    return "Emulated";
}

static size_t reg_get_device_count(ggml_backend_reg_t) {
    return 1;
}

static ggml_backend_dev_t reg_get_device(ggml_backend_reg_t, size_t) {
    return &device;
}

static ggml_backend_buffer_type_t get_mapped_buffer_type(ggml_backend_dev_t) {
    return &mapped_buft;
}

static void * reg_get_proc_address(ggml_backend_reg_t, const char * name) {
    return strcmp(name, MONARCH_MAPPED_BUFFER_TYPE) == 0 ? (void *) get_mapped_buffer_type : nullptr;
}

extern "C" void emulated_device_register(void) {
    device_buft.iface.get_name      = device_buft_get_name;
    device_buft.iface.alloc_buffer  = buft_alloc_buffer;
    device_buft.iface.get_alignment = buft_get_alignment;
    device_buft.device              = &device;

    mapped_buft = device_buft;
    mapped_buft.iface.get_name = mapped_buft_get_name;
    mapped_buft.iface.is_host  = mapped_buft_is_host;

    device.iface.get_name        = device_get_name;
    device.iface.get_description = device_get_name;
    device.iface.get_memory      = device_get_memory;
    device.iface.get_type        = device_get_type;
    device.iface.get_props       = device_get_props;
    device.iface.init_backend    = device_init_backend;
    device.iface.get_buffer_type = device_get_buffer_type;
    device.iface.supports_op     = device_supports_op;
    device.iface.supports_buft   = device_supports_buft;
    device.reg                   = &reg;

    reg.api_version            = GGML_BACKEND_API_VERSION;
    reg.iface.get_name         = reg_get_name;
    reg.iface.get_device_count = reg_get_device_count;
    reg.iface.get_device       = reg_get_device;
    reg.iface.get_proc_address = reg_get_proc_address;

    ggml_backend_register(&reg);
}
