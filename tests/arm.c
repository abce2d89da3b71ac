/* The kernels as a program for another processor, which an emulator runs: tests/arm.py sends it jobs. Buffers end where their page
 * ends and the next may not be touched, so that one entry too far is a fault. Of Python there is what a job needs. */
#include "_vnm.c"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
int omp_get_thread_num(void);

/* A PyObject here is an int64_t; the rest of Python.h's functions are never called, and left undefined. */
PyObject *PyExc_TypeError, *PyExc_ValueError, _Py_NoneStruct;
static const char *said;
long long PyLong_AsLongLong(PyObject *number) { return *(int64_t *)number; }
void *PyLong_AsVoidPtr(PyObject *number) { return (void *)(intptr_t) * (int64_t *)number; }
PyObject *PyErr_Occurred(void) { return said ? &_Py_NoneStruct : NULL; }
void PyErr_SetString(PyObject *kind, const char *text) { (void)kind, said = text; }
PyObject *PyErr_NoMemory(void) { return said = "no memory", NULL; }
PyThreadState *PyEval_SaveThread(void) { return NULL; }
void PyEval_RestoreThread(PyThreadState *state) { (void)state; }

static void take(void *into, size_t bytes) {
    if (bytes && fread(into, bytes, 1, stdin) != 1)
        exit(0); /* nobody asks any more */
}

static int64_t taken(void) {
    int64_t number;
    take(&number, sizeof number);
    return number;
}

static void answer(const char *text) {
    int64_t length = text ? (int64_t)strlen(text) : 0;
    fwrite(&length, sizeof length, 1, stdout);
    if (length)
        fwrite(text, (size_t)length, 1, stdout);
}

typedef struct {
    char *start, *at;
    size_t whole, bytes;
} buffer;

static buffer guarded(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page + page;
    char *start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + whole - page, page, PROT_NONE) != 0)
        exit(2);
    return (buffer){start, start + whole - page - bytes, whole, bytes};
}

/* numbers; then the place of each address among them, with the bytes there: of the first, which is the result's, only how many. */
static void do_job(void) {
    int64_t numbers[64], count = taken(), addresses;
    PyObject *arguments[64];
    buffer buffers[16];
    take(numbers, (size_t)count * sizeof *numbers);
    addresses = taken();
    for (int64_t i = 0; i < addresses; i++) {
        int64_t place = taken();
        buffers[i] = guarded((size_t)taken());
        if (i > 0)
            take(buffers[i].at, buffers[i].bytes);
        numbers[place] = (int64_t)(intptr_t)buffers[i].at;
    }
    for (int64_t i = 0; i < count; i++) arguments[i] = (PyObject *)&numbers[i];
    said = NULL;
    method_run(NULL, arguments, (Py_ssize_t)count);
    answer(said);
    if (said == NULL)
        fwrite(buffers[0].at, buffers[0].bytes, 1, stdout);
    for (int64_t i = 0; i < addresses; i++) munmap(buffers[i].start, buffers[i].whole);
}

int main(void) {
    parallel = GOMP_parallel, number_of_thread = omp_get_thread_num;
    pthread_key_create(&buffers, free);
    for (int i = 0; i < LEVELS; i++) answer(runs_here(levels[i].name) ? levels[i].name : "");
    for (answer(NULL);;) { /* an empty name ends the list */
        fflush(stdout);
        int64_t what = taken();
        if (what < 0)
            do_job();
        else
            chosen = &levels[what];
    }
}
