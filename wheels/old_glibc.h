/* Included before the kernels when a wheel is made of them. glibc 2.34 moved these two from libpthread into libc, under new versions;
 * their old versions are still there, and run on every glibc, in which they have not changed. */
#if defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
#else
#define OLDEST "GLIBC_2.17"
#endif
__asm__(".symver pthread_key_create, pthread_key_create@" OLDEST);
__asm__(".symver pthread_setspecific, pthread_setspecific@" OLDEST);
#undef OLDEST
