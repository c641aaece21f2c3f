// What this machine can do at most, with all threads: bytes read from memory and 8-bit multiply-adds.
// docs/speed.md compares the op with it.
//
//   cc -O3 -march=native -pthread scripts/peaks.c -o peaks && ./peaks [threads]

#define _GNU_SOURCE

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SIZE ((size_t) 512 << 20)

// enough to hide the latency
#define N_ACC 12

typedef int64_t i64_vec __attribute__((vector_size(64)));

static volatile int64_t sink;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9*t.tv_nsec;
}

// bytes
static double read_memory(void) {
    i64_vec * data = aligned_alloc(64, SIZE);
    memset(data, 1, SIZE);

    const double start = seconds();

    i64_vec sum = { 0 };
    for (int rep = 0; rep < 8; ++rep) {
        for (size_t i = 0; i < SIZE/sizeof(*data); ++i) {
            sum += data[i];
        }
        __asm__ volatile("" ::: "memory");
    }
    const double res = 8.0*SIZE/(seconds() - start);

    sink += sum[0];
    free(data);
    return res;
}

#if defined(__AVX512VNNI__)

#include <immintrin.h>

static double multiply_i8(void) {
    __m512i acc[N_ACC];
    for (int j = 0; j < N_ACC; ++j) {
        acc[j] = _mm512_setzero_si512();
    }
    __m512i x = _mm512_set1_epi8(1);

    const double start = seconds();

    const int64_t n = 40000000;
    for (int64_t i = 0; i < n; ++i) {
        for (int j = 0; j < N_ACC; ++j) {
            acc[j] = _mm512_dpbusd_epi32(acc[j], x, x);
        }
        __asm__ volatile("" : "+v"(x));
    }
    const double res = (double) n*N_ACC*64/(seconds() - start);

    for (int j = 0; j < N_ACC; ++j) {
        sink += _mm512_reduce_add_epi32(acc[j]);
    }
    return res;
}

#else

static double multiply_i8(void) {
    return 0.0; // not measured
}

#endif

struct job {
    double (*measure)(void);
    double   res;
};

static void * run(void * data) {
    struct job * job = data;
    job->res = job->measure();
    return NULL;
}

static double run_all(double (*measure)(void), int n_threads) {
    pthread_t  threads[256];
    struct job jobs   [256];

    double res = 0.0;
    for (int i = 0; i < n_threads; ++i) {
        jobs[i].measure = measure;
        pthread_create(&threads[i], NULL, run, &jobs[i]);
    }
    for (int i = 0; i < n_threads; ++i) {
        pthread_join(threads[i], NULL);
        res += jobs[i].res;
    }
    return 1e-9*res;
}

int main(int argc, char ** argv) {
    const int wanted    = argc > 1 ? atoi(argv[1]) : (int) sysconf(_SC_NPROCESSORS_ONLN);
    const int n_threads = wanted < 1 ? 1 : wanted > 256 ? 256 : wanted;

    printf("%d threads: %.1f GB/s read, ", n_threads, run_all(read_memory, n_threads));
    printf("%.0f G 8-bit multiply-adds/s\n", run_all(multiply_i8, n_threads));
    return 0;
}
